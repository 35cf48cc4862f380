#!/bin/sh
# ultralytics 8.4.190: `import ultralytics` looks up two public hosts' addresses and writes a settings file into the user's configuration
# folder before any function is called; HF_HUB_OFFLINE has no part in it. A program that only wants to read YOLOv5 weights from
# a disk waits for a resolver where there is no network, and is seen where there is one. YOLO_OFFLINE=true, set before the import, leaves the hosts alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ultralytics==8.4.190 torch==2.14.1 torchvision==0.29.1
cat > "$folder/watch.py" <<'PYTHON'
import pathlib
import socket

asked = []


def refuse(host, *arguments, **options):
    asked.append(host)
    raise OSError("this watch lets nothing through")


socket.getaddrinfo = socket.gethostbyname = refuse
import ultralytics

print("ultralytics", ultralytics.__version__, "looked up:", sorted(set(asked)))
written = sorted(path.name for path in pathlib.Path(__import__("os").environ["YOLO_CONFIG_DIR"]).rglob("*") if path.is_file())
print("wrote:", written)
PYTHON
YOLO_CONFIG_DIR="$folder/one" "$folder/venv/bin/python" "$folder/watch.py" 2>&1 | tee "$folder/plain"
YOLO_OFFLINE=true YOLO_CONFIG_DIR="$folder/two" "$folder/venv/bin/python" "$folder/watch.py" 2>&1 | tee "$folder/offline"
grep -q "looked up: \['dns.google', 'one.one.one.one'\]" "$folder/plain"
grep -q "settings.json" "$folder/plain"
grep -q "looked up: \[\]" "$folder/offline"

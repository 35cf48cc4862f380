#!/bin/sh
# nudenet 3.4.2: the detector that ships in the wheel is an export of ultralytics, whose models take RGB; the package hands it BGR. A file is read as BGR
# by OpenCV, `cvtColor(..., COLOR_RGBA2BGR)` exchanges the first and the third channel, and `blobFromImage(..., swapRB=True)` exchanges them back. An array in
# RGB, which the package takes as well, arrives as RGB: so the same picture gets other figures by its path than by its pixels.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nudenet==3.4.2 onnxruntime==1.23.2 opencv-python-headless==4.12.0.88
cat > "$folder/show.py" <<'PYTHON'
import sys
from importlib.metadata import version

import cv2
import numpy
from nudenet import nudenet

red = numpy.zeros((64, 64, 3), numpy.uint8)
red[:, :, 2] = 255  # OpenCV writes BGR: this is a red picture
path = sys.argv[1] + "/red.png"
cv2.imwrite(path, red)
detector = nudenet.NudeDetector()
print("nudenet", version("nudenet"), "model by", detector.onnx_session.get_modelmeta().custom_metadata_map.get("author"))


def shown(source):
    """Which of the three channels that the model gets holds the red."""
    blob = nudenet._read_image(source)[0]
    return [int(channel.mean() > 0.5) for channel in blob[0]]


print("red from a file arrives as", shown(path))
print("red from an RGB array arrives as", shown(red[:, :, ::-1].copy()))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder" | tee "$folder/seen"
grep -q "model by Ultralytics" "$folder/seen"
grep -qF "red from a file arrives as [0, 0, 1]" "$folder/seen"
grep -qF "red from an RGB array arrives as [1, 0, 0]" "$folder/seen"

"""Is it really gone, and what did it break? One report card of an erased encoder, pipeline or run, whoever made it.

`job.audit` reads what is audited (`subject`), gives it to every probe of `catalog.PROBES` with a bench to draw on (`bench`), and writes
``audit.json`` and ``audit.md`` (`card`). A probe is one question in one file, and answers with counts; a figure stands on the card only
where the same probe works on the original (`probe.Row.works`).
"""

"""The laboratory: planted worlds in which a method can be tried in seconds, and grids of runs that end in one table.

::

    vocabulary.py   the words of all worlds and their tokenizer
    worlds/         four tasks with a judge that never reaches training; rows, splits, corruption
    mixture.py      what the base model is pretrained on, and the rows that show what a run forgets
    base.py         the base model, trained once and kept
    definitions.py  what a run is, and its name
    code.py         which version of the library a result is of
    grid.py         a grid as a file; the strict reader
    plan.py         which runs a grid wants, given those that are done
    running.py      one run through the library's own trainers
    measures.py     what is measured of a policy
    pool.py         all cores, resumable
    table.py        one tidy table, and the paired differences
    page.py         lab.html
"""

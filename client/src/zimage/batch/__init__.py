"""Many images from one file, N at a time, which can be stopped and gone on with.

rows.py reads what is wanted, journal.py remembers what was begun, run.py does the rest,
watermark.py marks copies, results.py writes what came of it.
"""

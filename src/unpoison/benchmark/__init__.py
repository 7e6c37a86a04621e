"""A whole study from one task file: attack × victim × defence × seeds, cell by cell, and the tables that come of it.

task    → what the file asks for, checked          (task.py)
images  → training and test images with classes    (images.py)
cell    → one combination with one seed, measured  (cells.py)
run     → all cells, those that are done skipped   (run.py)
results → one row per measurement                  (results.py)
tables, plots, page → what a person reads
"""

"""How lists are written down, a file for each way: rows of columns, or files that belong together.

Rows are taken by the first layout whose columns they have (`choice`), sources of several parts by
what parts there are (`sources`).
"""

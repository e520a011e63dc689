"""Formats: pure functions between an optimizer's entries and other people's layouts and files.

`state_dict` and `pytorch` are the layouts of optimizers in memory. Files are read into a `run.Run`
of plain NumPy arrays and written from one: every format of files is a module with
``read(path) -> Run`` and ``write(path, run)``. `names` translates the names of one model into those
of another, `convert` does all at once.
"""

"""The data set that the project draws itself: shapes.py draws, builtin.py writes and registers."""

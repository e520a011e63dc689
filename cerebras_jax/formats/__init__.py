"""Files of other libraries, read into plain NumPy arrays and written from them."""

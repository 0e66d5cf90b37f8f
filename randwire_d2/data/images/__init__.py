"""Files of images: whether they are whole, their pixels, a disk that may be gone for a while.

Nothing here asks which data set an image is of, or how its labels are written.
"""

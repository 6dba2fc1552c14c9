"""The image builder behind `nydus-image`: trees from folders, tars and other images, and the files that they become.

Runs in the process of the command and in the worker processes of its pool (`nydusd.image.pool`). Output appears under
its final name only when it is complete: after a kill at most a hidden `.part` file is left.
"""

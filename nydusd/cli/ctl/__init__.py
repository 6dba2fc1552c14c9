"""The verbs of `nydusctl`, one file each, and what they share."""

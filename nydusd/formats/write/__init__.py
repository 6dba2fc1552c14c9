"""Writers of the image formats: plain data in, bytes out. The counterpart of the parsers in `nydusd.formats`.

No I/O and no state. What a writer cannot express (a name too long, an unknown attribute) raises `FormatError` naming it.
"""

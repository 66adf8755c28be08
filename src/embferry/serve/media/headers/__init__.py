"""Checks of what media files claim in their headers against what they can hold, before a decoder sees them.

Decoders reserve memory and time by such claims: 1.5 kB of MP4 can ask for gigabytes. Every function here is a pure
function of the file's bytes, whose work is bounded. It returns None, or raises
:class:`~embferry.serve.media.headers.claims.ClaimError`. A file that is cut off is left to the decoder.
"""

"""A process that decodes as another user than root, for whom the limits on processes hold."""

from __future__ import annotations

import ctypes
import os
import sys

from embferry.serve.media.decoding.process import main

if __name__ == "__main__":
    import PIL.AvifImagePlugin
    import PIL.Image
    import pillow_heif

    PIL.Image.init()
    pillow_heif.register_heif_opener()
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self belongs to root
    main(int(sys.argv[1]))

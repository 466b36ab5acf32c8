"""The core needs torch alone."""

import subprocess
import sys

CORE = ("sampling", "losses", "layers", "quiet")


def test_core_imports_without_detectron2():
    program = (
        "import sys\n"
        "for name in ('detectron2', 'fvcore', 'iopath', 'numpy', 'cv2', 'sklearn'):\n"
        "    sys.modules[name] = None  # importing it now fails\n"
        + "".join(f"import libra_d2.{name}\n" for name in CORE)
    )
    subprocess.run([sys.executable, "-c", program], check=True)

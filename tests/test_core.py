"""The core needs torch and torchvision alone."""

import subprocess
import sys
from pathlib import Path

CORE = ("sampling", "matching", "ranking", "losses", "layers", "quiet")


TESTS = Path(__file__).parent
TESTED = ("sampling", "hard_sampling", "matching", "ranking", "losses", "layers")


def test_cores_own_tests_pass_without_detectron2():
    """One of each file, where importing detectron2 fails and nothing else is to be had."""
    program = (
        "import sys, pytest\n"
        "sys.modules['detectron2'] = None\n"
        f"files = [{str(TESTS)!r} + f'/test_{{n}}.py' for n in {TESTED!r}]\n"
        "some = 'identity or references_agree or one_bin or one_group or equal_losses'\n"
        "some += ' or nothing_to_match'\n"
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', '-k', some, *files]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=TESTS.parent
    )
    assert result.returncode == 0, result.stdout
    assert "detectron2 is NOT installed" in result.stdout
    assert "8 passed" in result.stdout


def test_core_imports_without_detectron2():
    program = (
        "import sys\n"
        "for name in ('detectron2', 'fvcore', 'iopath', 'cv2', 'sklearn'):\n"
        "    sys.modules[name] = None  # importing it now fails\n"
        + "".join(f"import libra_d2.{name}\n" for name in CORE)
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""The other tests of this folder, in a process that starts in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import torch_moe_ops

FOLDER = Path(__file__).parent


def test_folder_passes_in_the_interpreter():
    package_root = str(Path(torch_moe_ops.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        cwd=FOLDER,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": package_root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

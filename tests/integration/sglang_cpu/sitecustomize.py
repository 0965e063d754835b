"""Imported by every Python process whose PYTHONPATH holds this folder, before SGLang.

SGLang needs torchvision to be importable; the compiled ops of PyPI's build do not load beside a CPU build of torch.
"""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

"""`python -m pretrain` where Triton's kernels are interpreted, and each launch is counted by the kernel's name.

TRITON_INTERPRET=1 python -m tests.pretrain.counted COUNTS.json train CONFIG ...
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from triton.runtime.interpreter import InterpretedFunction

from pretrain.__main__ import main

launches: Counter[str] = Counter()
_run = InterpretedFunction.run


def _counted(self: Any, *args: Any, **options: Any) -> Any:
    launches[self.fn.__name__] += 1
    return _run(self, *args, **options)


if __name__ == "__main__":
    InterpretedFunction.run = _counted
    code = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(launches))
    sys.exit(code)

"""`python -m benchmarks.alone MODULE …`: run a module as in its container, with its own needs only.

What only development installs is hidden: some libraries load it wherever they find it, structlog
`rich` and redis OpenTelemetry's SDK.
"""

import runpy
import sys

HIDDEN = ("rich", "opentelemetry.sdk")

if __name__ == "__main__":
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]  # as the import system documents it
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

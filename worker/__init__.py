"""The GPU edge: it draws. What is set here has to be before torch and diffusers are imported."""

import os
import sys

# Read once, when torch is loaded. On a CPU, torch's threads otherwise spin while they wait for each
# other and take the cores from the rest of the machine, and so from themselves: with one other busy
# process on two cores 512 x 512 took 7 to 15 s, so it takes 0.8 s; alone there is no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# diffusers imports torchao wherever it is installed: 1.7 s, and five warnings about parts of it
# that nobody uses here. So it shall not find it; what quantises does.
if "torchao" not in sys.modules:
    sys.modules["torchao"] = None  # type: ignore[assignment]

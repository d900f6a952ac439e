"""For networks and training code of other packages, which need not be installed.

`fuse_norm_act` puts our norm and activation into a network that is built already; `focuskernels.integrations.monai` and
`focuskernels.integrations.nnunet` hold losses with those packages' signatures and numbers.
"""

from .fuse import fuse_norm_act

__all__ = ["fuse_norm_act"]

"""Write small exported files, for `tests/arviz_open.py` to open where neither torch nor this package is installed.

    python -m tests.make_export OUT.nc

OUT.nc holds a request on a guide, OUT-draws.nc one on weighted draws, OUT-both.nc both as branches.
"""

import sys
from pathlib import Path

from pyro_forget.export import join, to_netcdf
from tests import requests


def main(path: Path) -> list[Path]:
    """Write the three files."""
    normal, draws = requests.tree(), requests.weighted_tree()
    both = join({"normal": normal, "draws": draws}, "Two requests")
    named = {"": normal, "-draws": draws, "-both": both}
    return [to_netcdf(tree, path.with_stem(path.stem + suffix)) for suffix, tree in named.items()]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(*main(Path(sys.argv[1])))

"""Reading, decoding and augmenting beside timm and torchvision: `python benchmarks/data.py data.root=/path ...`.

The same as `effnet-bench data`; results lie in benchmarks/results/.
"""

import sys

from effnet_train.cli.bench import main

if __name__ == "__main__":
    sys.argv.insert(1, "data")
    main()

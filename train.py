"""Meta-trains one configuration and measures it: python train.py estimator=symmetric width=250

Every setting is in configs/; python train.py --help lists them.
"""

from pathlib import Path

from fobmaml.run import main

if __name__ == "__main__":
    main(Path(__file__).absolute().with_name("configs"))

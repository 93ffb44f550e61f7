"""Whether equal numbers get equal sigmoids: the record behind a line of docs/findings.md.

python benchmarks/uneven.py
"""

import sys

import torch
from record import about, write


def main() -> int:
    found = tried = 0
    for experts in (8, 17, 60, 72, 160, 257):
        for value in torch.linspace(-8, 8, 200):
            row = torch.sigmoid(torch.full((experts,), float(value)))
            found += not bool((row == row[0]).all())
            tried += 1
    record = {
        "what": "constant rows that a function of one number turns into rows that are not constant",
        **about(),
        "function": "torch.sigmoid",
        "constant_rows": tried,
        "not_constant_afterwards": found,
    }
    print(write("uneven", record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Mistakes of loaders, planted into right SAEs of the bundled model: what `verify` says of each.

    python benchmarks/planted_faults.py            # the table
    python benchmarks/planted_faults.py --save     # docs/verify.md

The cases are those that tests/test_verify.py holds it to (tests/fault_cases.py). Each is tried with
what the right SAE declares, and again with nothing declared.
"""

from __future__ import annotations

import platform
import re
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # this folder's kernels.py would hide another package
sys.path.insert(1, str(ROOT / "tests"))

import torch  # noqa: E402
import typer  # noqa: E402
from fault_cases import FAULTS, RIGHT, Fault, model, rows  # noqa: E402

from saert.hub.verify import Verification, verify  # noqa: E402
from saert.sae import SAE  # noqa: E402

PAGE = ROOT / "docs" / "verify.md"
BEGIN, END = "<!-- table: python benchmarks/planted_faults.py -->", "<!-- end of table -->"
HEAD = "| planted | caught by | probable cause, as it says | nothing declared |"


def main(
    save: Annotated[bool, typer.Option("--save", help="Also docs/verify.md.")] = False,
) -> None:
    """Plant, verify, and print a table."""
    torch.set_num_threads(1)
    for name, right in RIGHT.items():
        if not (found := _verified(right(), model())).ok or found.warnings:
            raise SystemExit(f"{name} is right, but: {found}")
    lines = [_line(fault) for fault in FAULTS]
    head = [HEAD, "|---|---|---|---|"]
    foot = (
        f"{date.today()}: {len(RIGHT)} right SAEs of the bundled model pass without a warning. "
        f"{rows().numel()} tokens that the model wrote itself; {platform.machine()} CPU, 1 thread."
    )
    table = "\n".join([*head, *lines, "", foot])
    print(table)
    if save:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        page = f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(page, encoding="utf-8")


def _line(fault: Fault) -> str:
    sae = fault.sae()
    told = _verified(sae, fault.model())
    facts = ("declared", "metrics")
    sae.metadata = {key: value for key, value in sae.metadata.items() if key not in facts}
    untold = _verified(sae, fault.model())
    caught = ", ".join(check.fact for check in told.mismatches) or "not caught"
    named = untold.cause is not None and re.search(fault.cause, untold.cause)
    verdict = "refused" if not untold.ok else "warned" if untold.warnings else "not caught"
    cells = (fault.name, caught, told.cause or "", verdict + ("" if named else ", not named"))
    return "| " + " | ".join(cells) + " |"


def _verified(sae: SAE, network: object) -> Verification:
    return verify(sae, network, rows(), on_mismatch="report")


if __name__ == "__main__":
    typer.run(main)

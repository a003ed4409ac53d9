"""Write the tables of docs/performance.md from benchmarks/results: `python benchmarks/performance_tables.py [FILE]`.

What stands between `<!-- table: NAME.json -->` and `<!-- end -->` is replaced, by a remark where there is no such file.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as Markdown, the first as its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]]) + "\n"


def speed(result: Mapping[str, Any]) -> str:
    """Return the rates, and where the time goes."""
    head = ["variant", "contender", "ms", "images/s", "x reference", "peak MiB", "x floor"]
    rows: list[Sequence[object]] = [head]
    kinds: list[Sequence[object]] = [["variant", "contender", "where the time goes"]]
    for row in result["rows"]:
        name = row["name"] + (f" ({row['path']})" if row["path"] != "plain" else "")
        about = f"{row['variant']}, {row['resolution']} px, batch {row['batch_size']}, {row['precision']}"
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        ratio = f"{row['ratio']:.2f} {row['reference']}"
        rows.append(
            [about, name, f"{row['ms']:,.1f}", f"{row['images_per_s']:,.1f}", ratio, memory, row["times_floor"]]
        )
        if row["kinds"]:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row["kinds"].items() if share >= 0.02)
            kinds.append([row["variant"], name, shares])
    device = result["device"]
    about = (
        f"Copies {device['bytes_per_s'] / 1e9:,.1f} GB/s, products {device['flops_per_s'] / 1e12:,.2f} TFLOP/s, "
        f"{device['threads']} threads. "
    )
    floors = {row["variant"]: row["floor"] for row in result["rows"]}
    about += "; ".join(
        f"floor of {name}: {floor['ms']:,.1f} ms ({floor['flops'] / 1e9:,.0f} GFLOP, {floor['bytes'] / 1e6:,.0f} MB)"
        for name, floor in floors.items()
    )
    return f"{about}.\n\n{table(rows)}" + (f"\n{table(kinds)}" if len(kinds) > 1 else "")


def startup(result: Mapping[str, Any]) -> str:
    """Return the seconds of the starts."""
    rows = [[name, row["seconds"], f"under {row['limit_s']:g}"] for name, row in result["startup"].items()]
    return table([["effnet-train", "seconds", "wanted"], *rows])


def ways(result: Mapping[str, Any]) -> str:
    """Return how many times as fast all together is as all but one."""
    rows = [[job, name, f"{ratio:.2f}"] for job, found in result["ways"].items() for name, ratio in found.items()]
    return table(
        [["B0", "without one thing", "all has so many times its rate"], *(row for row in rows if row[1] != "all")]
    )


def sums(result: Mapping[str, Any]) -> str:
    """Return the measured sums, the steps by options, and the modelled efficiencies."""
    measured = [[f"{int(size) / 1024:,.0f} KiB", f"{1000 * s:.2f}"] for size, s in result["sums_s"].items()]
    steps = [[name, f"{1000 * s:,.0f}", result["step_ratio"][name]] for name, s in result["step_s"].items()]
    sizes = list(result["modelled"][0]["efficiency_by_bucket_mib"])
    modelled = [
        [row["variant"], f"{row['step_ms']:g}", row["gpus"], row["gradient_mib"], f"{row['sum_ms']:.2f}"]
        + [f"{100 * row['efficiency_by_bucket_mib'][size]:.1f} %" for size in sizes]
        for row in result["modelled"]
    ]
    head = ["variant", "step ms", "GPUs", "gradient MiB", "sum ms", *(f"buckets of {size} MiB" for size in sizes)]
    return "\n".join(
        [
            table([["sum of", "ms (gloo, 2 ranks)"], *measured]),
            table([["step of B0", "ms", "x alone"], *([n, m, f"{r:.3f}"] for n, m, r in steps)]),
            table([head, *modelled]),
        ]
    )


def written(name: str) -> str:
    """Return the table of a result, with the machine that it was measured on."""
    file = RESULTS / name
    if not file.exists():
        return f"Not measured yet: there is no benchmarks/results/{name}.\n"
    result = json.loads(file.read_text())
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cpus']} CPUs"
    packages = ", ".join(f"{p} {machine['packages'][p]}" for p in ("torch", "timm", "torchvision"))
    kinds = {"startup": startup, "sums_s": sums, "ways": ways, "rows": speed}
    kind = next(kind for key, kind in kinds.items() if key in result)
    return f"{where}; {packages}; load {machine['load']} at the end.\n\n{kind(result)}"


def main() -> None:
    """Replace the tables."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "performance.md"
    file.write_text(MARKED.sub(lambda found: f"{found[1]}{written(found[2])}{found[3]}", file.read_text()))
    print(f"written: {file}")


if __name__ == "__main__":
    main()

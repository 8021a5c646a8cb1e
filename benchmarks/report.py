"""Tables and picture of what benchmarks/attention.py measured."""

from pathlib import Path

from measure import decode_floor_ms, forward_floor_ms, reached_limits
from methods import CUDNN, FLA_NORMALISED, FLASH, OURS

HEADLINE = {"batch": 1, "heads": 32, "head_dim": 64}
SIZES = ("batch", "heads", "head_dim", "length", "cache_length")


def median_ms(content: dict, **labels) -> float | None:
    """The time of the record with these labels; None if it was not measured."""
    for record in content["records"]:
        if all(record.get(key) == value for key, value in labels.items()):
            return record.get("median_ms")
    return None


def figures(content: dict) -> list[tuple[str, float | None, str]]:
    """(figure, value, goal) of each ratio that the kernels are to reach; None where a part was not measured."""

    def headline_ms(part, method, length, **labels):
        return median_ms(content, part=part, method=method, length=length, **{**HEADLINE, **labels})

    def faster(part, length, *others):
        theirs = [ms for ms in (headline_ms(part, other, length) for other in others) if ms]
        return ratio(min(theirs, default=None), headline_ms(part, OURS, length))

    limits, rows = reached_limits(content), []
    for name in (FLASH, CUDNN):
        goal = "3 x" if name == FLASH else "-"
        rows.append((f"causal forward at 8k, faster than {name}", faster("forward", 8192, name), goal))
        rows.append((f"forward+backward at 16k, faster than {name}", faster("backward", 16384, name), goal))
        slower = [
            record["length"]
            for record in content["records"]
            if record["part"] == "forward" and record["method"] == name and "median_ms" in record
            if record["median_ms"] < (headline_ms("forward", OURS, record["length"]) or 0)
        ]
        measured = faster("forward", 8192, name) is not None
        longest = max(slower, default=0) if measured else None
        rows.append((f"longest T at which {name} is faster", longest, "<= 4096" if name == FLASH else "-"))
    for part, label in (("forward", "forward"), ("backward", "forward+backward")):
        for length in (8192, 32768):
            rows.append(
                (f"{label} at {length // 1024}k, faster than fla", faster(part, length, *FLA_NORMALISED), "3 x")
            )
    floor = forward_floor_ms(limits, length=32768, **HEADLINE)
    rows.append(("forward at 32k over the floor", ratio(headline_ms("forward", OURS, 32768), floor), "<= 3 x"))
    step = median_ms(content, part="decode", method=OURS, **{**HEADLINE, "batch": 64})
    floor = decode_floor_ms(limits, **{**HEADLINE, "batch": 64})
    rows.append(("decode over the bandwidth floor, B = 64", ratio(step, floor), "<= 1.5 x"))
    for heads in (32, 9):
        times = [headline_ms("transfer", name, 8192, heads=heads) for name in ("torch", "fused")]
        rows.append((f"attention transfer at 8k, {heads} heads, faster than torch", ratio(*times), "3 x"))
    return rows


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def print_report(content: dict) -> None:
    """All records as one table a part, then the figures."""
    print(f"\n{content['machine']}  {content['versions']}\n{reached_limits(content)}")
    for part in dict.fromkeys(record["part"] for record in content["records"]):
        _print_part(part, content)
    for record in content["records"]:
        if "peak_memory_bytes" in record:
            size = f"{record['heads']} heads, {record['length']} tokens"
            print(f"{record['part']}, {record['method']}, {size}: peak {record['peak_memory_bytes'] / 2**30:.2f} GiB")
    print(f"\n{'figure':60}{'measured':>12}{'goal':>10}")
    for name, value, goal in figures(content):
        print(f"{name:60}{'-' if value is None else f'{value:.2f}':>12}{goal:>10}")


def _print_part(part: str, content: dict) -> None:
    """Milliseconds, a row a method and a column a size."""
    records, limits = [record for record in content["records"] if record["part"] == part], reached_limits(content)
    sizes = sorted({_size(record) for record in records})
    table: dict[str, dict[tuple, str]] = {}
    for record in records:
        table.setdefault(record["method"], {})[_size(record)] = _cell(record)
    floors = {_size(record): floor for record in records if (floor := _floor(record, limits))}
    if floors:
        table["floor"] = {size: f"{floor:.4g}" for size, floor in floors.items()}
    print(f"\n{part}, milliseconds (* with the launches of Python)")
    for row, name in enumerate(SIZES):
        print(f"{name:30}" + "".join(f"{size[row] or '':>11}" for size in sizes))
    for method, cells in table.items():
        print(f"{method:30}" + "".join(f"{cells.get(size, ''):>11}" for size in sizes))


def _size(record: dict) -> tuple[int, ...]:
    return tuple(record.get(name, 0) for name in SIZES)


def _cell(record: dict) -> str:
    if "median_ms" not in record:
        return "-" if "skipped" in record else "failed"
    return f"{record['median_ms']:.4g}" + ("*" if record["timer"] == "launches" else "")


def _floor(record: dict, limits: dict) -> float | None:
    shape = {name: record[name] for name in HEADLINE}
    if record["part"].endswith("forward"):
        return forward_floor_ms(limits, length=record["length"], **shape)
    if record["part"] == "decode" and "cache_length" not in record:
        return decode_floor_ms(limits, **shape)
    return None


def plot(content: dict, path: Path) -> None:
    """Time over length of every method in log-log scale, forward with its floor and forward+backward."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, constrained_layout=True)
    parts = ("forward", "backward")
    records = [record for record in content["records"] if record["part"] in parts and "median_ms" in record]
    methods = dict.fromkeys(record["method"] for record in records)
    colours = dict(zip(methods, pyplot.colormaps["Paired"].colors, strict=False))
    for panel, part, title in zip(panels, parts, ("forward", "forward and backward"), strict=True):
        for method, colour in colours.items():
            points = sorted(
                (r["length"], r["median_ms"]) for r in records if (r["part"], r["method"]) == (part, method)
            )
            if points:
                width = 2.5 if method == OURS else 1.2
                panel.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=width, label=method)
        panel.set(title=title, xlabel="tokens", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    lengths = sorted({record["length"] for record in records})
    shape = {name: records[0][name] for name in HEADLINE}
    floor = [forward_floor_ms(reached_limits(content), length=length, **shape) for length in lengths]
    panels[0].plot(lengths, floor, "k--", label="floor")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8)
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items()).replace("_", " ")
    figure.suptitle(f"Causal attention, bf16, {sizes}, {content['machine']}")
    figure.savefig(path)

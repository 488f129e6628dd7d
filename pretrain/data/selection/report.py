"""What a selection did, as one HTML page: no script, nothing from elsewhere, every text of the corpus escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.selection.charts import bars, escaped, histogram
from pretrain.data.selection.clusters import Summary
from pretrain.data.selection.rules import Rule
from pretrain.data.selection.select import Selection
from pretrain.data.selection.sorting import write_whole
from pretrain.data.selection.tally import Cluster, Example, Tally

NAME = "selection-report.html"
SHOWN = 10  # of the largest clusters
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1c2024 } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { margin-top: 2.2rem; font-size: 1.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #e3e6e9 }
th { font-weight: 600; color: #5b636b } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 30% } .share { background: #3b7dd8; height: .7rem; margin-top: .35rem; border-radius: 2px }
tr.total td { font-weight: 600 } tr.none td { color: #a3abb3 } .quiet { color: #5b636b } .name { overflow-wrap: anywhere }
td.name { min-width: 13rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem } figure { margin: 0 }
figcaption { font-size: .85rem; color: #5b636b } svg { width: 100%; height: auto; display: block }
.example { border-left: 3px solid #e3e6e9; padding: .1rem .8rem; margin: .5rem 0 } .example p { margin: .1rem 0 }
blockquote { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-family: 'DejaVu Sans Mono', monospace;
  font-size: .8rem; max-height: 9rem; overflow: hidden }
"""


def write_report(path: Path, selection: Selection, tally: Tally, summary: Summary | None = None) -> None:
    """Write the page. summary: of the clusters, where documents were clustered; its histograms are in it, not in the tally."""
    total = Tally.from_json(tally.to_json())
    if summary is not None:
        total.add_histograms(summary.histograms)
    write_whole(path, "".join(_page(selection, total, summary)).encode("utf-8", "replace"))


def _page(selection: Selection, tally: Tally, summary: Summary | None) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>What was selected</title>\n'
    yield '<meta name="viewport" content="width=device-width">\n'
    yield f"<style>{STYLE}</style></head><body>\n<h1>What was selected</h1>\n"
    yield f'<p class="quiet">Selection {selection.fingerprint[:16]}</p>\n'
    yield f"<p>{_counted(tally.read, 'document')} ({_bytes(tally.bytes_read)}) were read and "
    yield f"<b>{_counted(tally.kept, 'document')} ({_bytes(tally.bytes_kept)}) kept</b>, "
    yield f"{_share(tally.bytes_kept, tally.bytes_read)} of the bytes. Of {_counted(tally.changed, 'kept document')} the text "
    yield "was changed. Each document that is not here any more has one reason: the first, in this order.</p>\n"
    yield from _reasons(selection, tally)
    if summary is not None:
        yield from _duplicates(summary, tally.largest)
    yield from _histograms(selection.rules, tally.histograms)
    yield from _examples(selection.reasons, tally)
    yield "</body></html>\n"


def _reasons(selection: Selection, tally: Tally) -> Iterator[str]:
    yield '<table><tr><th>reason</th><th class="n">documents</th><th class="n">share</th><th class="n">bytes</th>'
    yield '<th class="n">share</th><th></th></tr>\n'
    for reason in selection.reasons:
        documents, size = tally.dropped.get(reason, (0, 0))
        if documents or not reason.startswith(("near", "quality", "contam", "exact")):
            yield _row(reason, documents, size, tally)
    rest = tally.bytes_read - tally.bytes_kept - sum(size for _, size in tally.dropped.values())
    yield _row("parts of documents that were kept", tally.changed, rest, tally)
    yield _row("kept", tally.kept, tally.bytes_kept, tally, "total")
    yield _row("read", tally.read, tally.bytes_read, tally, "total")
    yield "</table>\n"


def _row(name: str, documents: int, size: int, tally: Tally, kind: str = "") -> str:
    share = 100 * size / max(tally.bytes_read, 1)
    return (
        f'<tr class="{kind or ("" if documents else "none")}"><td>{escaped(name)}</td>'
        f'<td class="n">{documents:,}</td><td class="n">{_share(documents, tally.read)}</td>'
        f'<td class="n">{_bytes(size)}</td><td class="n">{share:.1f}%</td>'
        f'<td class="bar"><div class="share" style="width:{share:.2f}%"></div></td></tr>\n'
    )


def _duplicates(summary: Summary, largest: Sequence[Cluster]) -> Iterator[str]:
    clusters = sum(summary.sizes.values())
    yield f"<h2>Copies</h2>\n<p>{_counted(summary.exact, 'exact copy', 'exact copies')} and {summary.near:,} near, "
    yield f"in {_counted(clusters, 'cluster')} of two documents or more.</p>\n"
    if not clusters:
        return
    yield '<div class="charts"><figure>'
    yield bars(_by_octave(summary.sizes))
    yield "<figcaption>clusters by documents in them</figcaption></figure></div>\n"
    if largest:
        yield "<h3>The largest of which a document was kept</h3>\n<table>"
        yield '<tr><th class="n">documents</th><th>stands for them</th><th>begins</th></tr>\n'
        for cluster in largest[:SHOWN]:
            yield f'<tr><td class="n">{cluster.size:,}</td><td class="name">{escaped(cluster.name)}</td>'
            yield f'<td class="name">{escaped(" ".join(cluster.beginning.split())[:100])}</td></tr>\n'
        yield "</table>\n"


def _by_octave(sizes: dict[int, int]) -> list[tuple[str, int]]:
    """Counts of clusters of 2, 3 to 4, 5 to 8 ... documents."""
    counts: dict[int, int] = {}
    for size, count in sizes.items():
        octave = (size - 1).bit_length()
        counts[octave] = counts.get(octave, 0) + count
    named = []
    for octave in range(1, max(counts) + 1):
        low, high = 2 ** (octave - 1) + 1, 2**octave
        named.append((f"{low:,}" if low == high else f"{low:,} to {high:,}", counts.get(octave, 0)))
    return named


def _histograms(rules: Sequence[Rule], counts: Sequence[Sequence[int]]) -> Iterator[str]:
    drawn = [(rule, row) for rule, row in zip(rules, counts, strict=False) if rule.scale is not None and any(row)]
    if not drawn:
        return
    yield "<h2>What the rules measured</h2>\n<p>Of the documents that came as far as the rule, exact copies included; the height "
    yield "is the square root of the number, so that few are seen beside many. Red lies beyond the "
    yield 'threshold, which is the line; the outer bars hold what the axis does not.</p>\n<div class="charts">\n'
    for rule, row in drawn:
        yield f"<figure>{histogram(rule, row)}<figcaption>{escaped(rule.name)}</figcaption></figure>\n"
    yield "</div>\n"


def _examples(reasons: Sequence[str], tally: Tally) -> Iterator[str]:
    if not tally.examples:
        return
    yield "<h2>Examples</h2>\n"
    for reason in reasons:
        if tally.examples.get(reason):
            documents, size = tally.dropped[reason]
            yield f'<h3>{escaped(reason)} <span class="quiet">{_counted(documents, "document")}, {_bytes(size)}</span></h3>\n'
            yield from (_example(example) for example in tally.examples[reason])


def _example(example: Example) -> str:
    return (
        f'<div class="example"><p class="name"><b>{escaped(example.name)}</b></p>'
        f'<p class="quiet name">{escaped(example.detail)}</p><blockquote>{escaped(example.beginning)}</blockquote></div>\n'
    )


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"

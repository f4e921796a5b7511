"""Judges every record and every picture of all sets, and sums up what was found.

The judging is the building of the length indexes, so a check that was killed goes on, and a
training that uses the same cache need not measure again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmlm.data.annotation import IntArray, parse_record, read_line, read_meta, scan_lines
from mmlm.data.index_build import run_build
from mmlm.data.ledger import LedgerCounts, LedgerEntry, count_entries
from mmlm.data.length_index import Rows, SetIndex
from mmlm.data.rejection import Action, Reason
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer

NUM_BINS = 16
"""Bars of a length histogram; one more is for what is longer than ``seq_length``."""

_NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Double:
    """One id that several records have."""

    identity: str
    """The id."""
    places: tuple[str, ...]
    """``file:line`` of the records, of many the first."""


@dataclass(frozen=True, kw_only=True)
class Doubles:
    """Ids that several records have. They are trained on; they only say something of the data."""

    num_ids: int
    """Different ids."""
    num_records: int
    """Records that have them."""
    examples: tuple[Double, ...]
    """The first of them."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was found in one set, or in all; a record counts once, however often it is repeated."""

    name: str
    """Key in the meta json, or ``total``."""
    num_records: int
    """Records that were judged."""
    num_usable: int
    """Records that are trained on."""
    num_samples: int
    """Samples of an epoch: usable records times the repeats of their set."""
    num_images: int
    """Pictures of usable records, after the cut."""
    num_text_only: int
    """Usable records without a picture."""
    found: LedgerCounts
    """Ledger entries by action and reason."""
    num_tokens: int
    """Tokens of usable records, after the cut; images' places included."""
    num_supervised_tokens: int
    """Those that are trained on."""
    shortest_tokens: int
    """Of the usable records after the cut; 0 where there is none."""
    longest_tokens: int
    """Likewise."""
    lengths: tuple[int, ...]
    """Usable records in each bin of `CheckReport.length_edges`, by their length before the cut."""
    num_without_id: int
    """Records without an id."""
    doubles: Doubles
    """Ids that occur twice: in the set, or (of the total) in more than one set."""

    @property
    def mean_tokens(self) -> float:
        """Mean length of the usable records after the cut."""
        return self.num_tokens / max(1, self.num_usable)

    def count(self, action: Action) -> int:
        """Ledger entries of one action."""
        return sum(self.found.get(action, {}).values())


@dataclass(frozen=True, kw_only=True)
class SetSummary(Summary):
    """What was found in one set, and what the meta json says of it."""

    annotation: str
    """The jsonl file."""
    repeats: int
    """How often its records come in an epoch."""
    num_unused: int
    """Records after the share that a ``repeat_time`` below 1 takes; they were not judged."""
    promised: int | None
    """``length`` of the meta json."""

    @property
    def keeps_promise(self) -> bool:
        """Whether the meta's ``length``, if any, is that of the file or of the share."""
        return self.promised in (None, self.num_records, self.num_records + self.num_unused)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything that ``mmlm data check`` found."""

    meta: str
    """The meta json."""
    tokenizer: str
    """Folder of the tokenizer."""
    settings: SampleSettings
    """Lengths and sizes."""
    length_edges: tuple[int, ...]
    """Upper ends (inclusive) of the bins of `Summary.lengths`; the last bin, of what is longer than
    ``seq_length``, has none."""
    sets: tuple[SetSummary, ...]
    """In the order of the meta json."""
    total: Summary
    """Over all sets."""
    ledger: tuple[LedgerEntry, ...]
    """All entries, in the order of the sets."""
    seconds: float
    """Time of the judging."""
    num_workers: int
    """Processes that judged."""
    reused: bool
    """Whether what was measured before was taken where there was some."""
    num_resumed: int
    """Records that were not judged now, but by a check that was stopped."""
    stopped_at: float | None
    """When that one stopped, seconds since 1970."""

    @property
    def exclusions(self) -> tuple[LedgerEntry, ...]:
        """Records that cannot be used."""
        return tuple(entry for entry in self.ledger if entry.action == Action.EXCLUDED)


def check_data(
    meta: str | Path,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    *,
    cache_dir: Path,
    num_workers: int = 1,
    again: bool = True,
) -> CheckReport:
    """Judge all sets of a meta json.

    Args:
        meta: the meta json.
        tokenizer: of the language model.
        settings: lengths and sizes.
        cache_dir: where the indexes are kept.
        num_workers: processes that judge.
        again: judge everything, also where there is a finished index. What a check that was
            killed in the last hours (`RESUME_HOURS`) has judged is not judged again.

    Raises:
        DataError: as `read_meta` and `run_build`; a broken record is a finding, not an error.
    """
    begin = time.perf_counter()
    build = run_build(
        read_meta(meta), tokenizer, settings, cache_dir, num_workers=num_workers, again=again
    )
    seconds = time.perf_counter() - begin
    indexes = build.indexes
    longest = max(int(index.column("num_tokens_uncut").max()) for index in indexes)
    edges = length_edges(settings.seq_length, longest)
    ledgers = [index.ledger() for index in indexes]
    sets = tuple(
        _summarise_set(index, ledger, edges) for index, ledger in zip(indexes, ledgers, strict=True)
    )
    return CheckReport(
        meta=str(meta),
        tokenizer=str(tokenizer.folder),
        settings=settings,
        length_edges=edges,
        sets=sets,
        total=_summarise_all(indexes, sets),
        ledger=tuple(entry for ledger in ledgers for entry in ledger),
        seconds=seconds,
        num_workers=num_workers,
        reused=not again,
        num_resumed=build.num_resumed,
        stopped_at=build.stopped_at,
    )


def length_edges(seq_length: int, longest: int) -> tuple[int, ...]:
    """Return the upper ends of the bins of a length histogram.

    Args:
        seq_length: tokens; the last end, unless all samples are much shorter.
        longest: tokens of the longest sample before the cut.
    """
    span = seq_length
    while span >= 2 * max(longest, NUM_BINS):
        span //= 2
    return tuple(sorted({max(1, span * k // NUM_BINS) for k in range(1, NUM_BINS + 1)}))


def _summarise_set(
    index: SetIndex, ledger: Sequence[LedgerEntry], edges: tuple[int, ...]
) -> SetSummary:
    entry, rows = index.annotation_set, index.rows
    used = rows[rows["usable"] == 1]
    tokens = used["num_tokens"]
    bins = np.searchsorted(np.array(edges), used["num_tokens_uncut"], side="left")
    lines = rows["line"]
    num_in_file = len(scan_lines(entry.annotation)[0]) if entry.repeat_time < 1 else len(rows)
    return SetSummary(
        name=entry.name,
        annotation=str(entry.annotation),
        repeats=entry.repeats,
        num_unused=num_in_file - len(rows),
        promised=entry.length,
        num_records=len(rows),
        num_usable=len(used),
        num_samples=len(used) * entry.repeats,
        num_images=int(used["num_images"].sum()),
        num_text_only=int(np.count_nonzero(used["num_images"] == 0)),
        found=count_entries(ledger),
        num_tokens=int(tokens.sum()),
        num_supervised_tokens=int(used["num_supervised_tokens"].sum()),
        shortest_tokens=int(tokens.min()) if len(used) else 0,
        longest_tokens=int(tokens.max(initial=0)),
        lengths=tuple(np.bincount(bins, minlength=len(edges) + 1).tolist()),
        num_without_id=_num_without_id(rows, ledger),
        doubles=_doubles([index], rows["identity"], np.zeros_like(lines), np.arange(len(rows))),
    )


def _num_without_id(rows: Rows, ledger: Sequence[LedgerEntry]) -> int:
    """A line that is no record has no id either, but that is not what is wrong with it."""
    malformed = {entry.line for entry in ledger if entry.reason == Reason.MALFORMED_RECORD}
    lines = rows["line"][rows["identity"] == 0].tolist()
    return sum(line not in malformed for line in lines)


def _summarise_all(indexes: Sequence[SetIndex], sets: Sequence[SetSummary]) -> Summary:
    """Sum up the sets; an id counts as double where it stands in more than one of them."""
    firsts, owners, places = [], [], []
    for number, index in enumerate(indexes):
        # each id of a set once, at its first place
        hashes, first = np.unique(index.rows["identity"], return_index=True)
        firsts.append(hashes)
        owners.append(np.full(len(hashes), number))
        places.append(first)
    found: dict[Action, dict[Reason, int]] = {}
    for summary in sets:
        for action, reasons in summary.found.items():
            counts = found.setdefault(action, {})
            for reason, count in reasons.items():
                counts[reason] = counts.get(reason, 0) + count
    used = [summary for summary in sets if summary.num_usable]
    return Summary(
        name="total",
        num_records=sum(summary.num_records for summary in sets),
        num_usable=sum(summary.num_usable for summary in sets),
        num_samples=sum(summary.num_samples for summary in sets),
        num_images=sum(summary.num_images for summary in sets),
        num_text_only=sum(summary.num_text_only for summary in sets),
        found={action: found[action] for action in Action if action in found},
        num_tokens=sum(summary.num_tokens for summary in sets),
        num_supervised_tokens=sum(summary.num_supervised_tokens for summary in sets),
        shortest_tokens=min((summary.shortest_tokens for summary in used), default=0),
        longest_tokens=max((summary.longest_tokens for summary in used), default=0),
        lengths=tuple(map(sum, zip(*(summary.lengths for summary in sets), strict=True))),
        num_without_id=sum(summary.num_without_id for summary in sets),
        doubles=_doubles(
            indexes, np.concatenate(firsts), np.concatenate(owners), np.concatenate(places)
        ),
    )


def _doubles(
    indexes: Sequence[SetIndex], hashes: IntArray, owners: IntArray, places: IntArray
) -> Doubles:
    """Find hashes that occur twice; read the ids and lines of the first few of them.

    Args:
        indexes: the sets.
        hashes: of ids; 0 is none.
        owners: which set each is from.
        places: which row of it each is.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(ordered) else order
    sizes = np.diff(np.append(starts, len(ordered)))
    double = (sizes > 1) & (ordered[starts] != 0)
    groups = [
        order[start : start + size]
        for start, size in zip(starts[double], sizes[double], strict=True)
    ]
    groups.sort(key=lambda group: int(group[0]))
    return Doubles(
        num_ids=len(groups),
        num_records=int(sizes[double].sum()),
        examples=tuple(
            _double([(indexes[int(owners[k])], int(places[k])) for k in group[:_NUM_EXAMPLES]])
            for group in groups[:_NUM_EXAMPLES]
        ),
    )


def _double(members: Sequence[tuple[SetIndex, int]]) -> Double:
    index, place = members[0]
    file, row = index.annotation_set.annotation, index.rows[place]
    text = read_line(file, int(row["offset"]), index.stamp)
    return Double(
        identity=parse_record(text, file=file, line=int(row["line"])).identity,
        places=tuple(
            f"{each.annotation_set.annotation}:{each.rows['line'][number]}"
            for each, number in members
        ),
    )

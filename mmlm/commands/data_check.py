"""``mmlm data check``: judge every record before a training does."""

import argparse
import os
from pathlib import Path

from mmlm.commands.data_arguments import add_sample_arguments, check_meta, read_sample_arguments
from mmlm.commands.recipe_arguments import Commands
from mmlm.errors import ConfigError

DESCRIPTION = """\
Judge every record of every set as a training would: the JSON, the turns, the
placeholders against the pictures, the pictures (each is decoded to its end), the
length, the supervised tokens that are left after the cut. Ids that occur twice are
reported, but are no fault. Nothing in the data is changed.
"""

EPILOG = """\
examples (on the data and weights that examples/internvl_v1_2/pretrain.sh has made):
    mmlm data check work_dirs/demo_cache/internvl_1_2_finetune.json \\
        --load work_dirs/demo_cache/converted
  the published data, with the tokenizer of the LLM:
    mmlm data check playground/internvl_1_2_finetune.json \\
        --tokenizer pretrained/Nous-Hermes-2-Yi-34B --output work_dirs/check
  so that a training with --set data.cache_dir=work_dirs/data_cache need not measure:
    mmlm data check META --load CKPT --cache-dir work_dirs/data_cache

A check that is killed goes on where it was when the same command is given again.
A finished one judges everything again, unless --reuse says otherwise.

what is in the report's folder:
  report.txt          the table that is printed
  report.json         the same for machines: version, passed, num_dropped, sets, total
  lengths.png         histograms of lengths
  data_ledger.jsonl   a line for each record that is excluded, truncated, repaired or noted:
                      set, file, line, id, action, reason, detail
exit status: 0; 1 if a record cannot be used and --policy is strict, or for an error
"""


def add_check_parser(topics: Commands) -> None:
    """Add ``check`` to the topics of ``mmlm data``."""
    check = topics.add_parser(
        "check",
        help="judge every record and every picture before a training does",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("meta", metavar="META", help="meta json of the sets")
    add_sample_arguments(check)
    check.add_argument(
        "--policy",
        choices=("strict", "skip"),
        default="strict",
        help="strict: exit status 1 if any record cannot be used; skip: that is accepted "
        "(default: strict)",
    )
    check.add_argument(
        "--num-workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that judge (default: one a core, here %(default)s)",
    )
    check.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the report (default: work_dirs/data_check/NAME, NAME being the meta "
        "json's)",
    )
    check.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder of the length indexes: the data.cache_dir of a training (default: cache/ in "
        "the report's folder)",
    )
    check.add_argument(
        "--reuse",
        action="store_true",
        help="take what a finished check or training has measured, instead of judging again",
    )
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """``mmlm data check``.

    Returns:
        0, or 1 where a record cannot be used and the policy is strict.
    """
    check_meta(options.meta)
    if options.num_workers < 1:
        raise ConfigError(f"--num-workers {options.num_workers}: must be at least 1")
    from mmlm.data.dataset import cache_folder
    from mmlm.data.preflight import check_data
    from mmlm.data.preflight_report import format_report, verdict, write_report

    tokenizer, settings = read_sample_arguments(options)
    name = Path(options.meta).stem
    output = Path(options.output or Path("work_dirs") / "data_check" / name)
    report = check_data(
        options.meta,
        tokenizer,
        settings,
        cache_dir=cache_folder(options.cache_dir or output / "cache", options.meta),
        num_workers=options.num_workers,
        again=not options.reuse,
    )
    write_report(report, output, options.policy)
    print(format_report(report))
    print(verdict(report, options.policy))
    print(f"written     {output}: report.json, report.txt, lengths.png, data_ledger.jsonl")
    return 1 if report.exclusions and options.policy == "strict" else 0

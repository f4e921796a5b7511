"""The command group ``mmlm data``: prepare, check and look at training data."""

from mmlm.commands.data_check import add_check_parser
from mmlm.commands.data_dump import add_dump_parser
from mmlm.commands.data_prepare import add_prepare_parser
from mmlm.commands.data_show import add_show_parser
from mmlm.commands.recipe_arguments import Commands


def add_data_parser(commands: Commands) -> None:
    """Add ``data`` and its topics to the commands of ``mmlm``."""
    data = commands.add_parser("data", help="prepare, check and look at training data")
    topics = data.add_subparsers(dest="topic", required=True, metavar="TOPIC")
    for add in (add_prepare_parser, add_check_parser, add_show_parser, add_dump_parser):
        add(topics)

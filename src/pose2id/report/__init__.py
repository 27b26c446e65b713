"""What the method does for your features: rows of figures, measured alike, as text, records and tables."""

from pose2id.report.comparison import Comparison, Row, by_number, compare, labels_of, measure, pair_of
from pose2id.report.studies import check_study, study
from pose2id.report.tables import number_table, records, table
from pose2id.report.ways import Pair, Sets, safely, unpublished, with_nfc

__all__ = [
    "Comparison",
    "Pair",
    "Row",
    "Sets",
    "by_number",
    "check_study",
    "compare",
    "labels_of",
    "measure",
    "number_table",
    "pair_of",
    "records",
    "safely",
    "study",
    "table",
    "unpublished",
    "with_nfc",
]

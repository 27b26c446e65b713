"""What the method does for your features: rows of figures, measured alike, as text and records."""

from pose2id.report.comparison import Pair, Row, by_number, compare, number_table, records, table, with_nfc

__all__ = ["Pair", "Row", "by_number", "compare", "number_table", "records", "table", "with_nfc"]

"""Tables as parquet files that hold content alone: no index and no versions of what wrote them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table; equal tables give equal bytes under one version of pyarrow, whose name parquet always keeps."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path)

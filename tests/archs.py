"""The table of architectures: one row each, which switches on the contract suite (`test_archs_contract.py`)."""

from typing import get_args

import rows_auraflow
import rows_flux
import rows_lumina2
import rows_pixart
import rows_sd
import rows_sd3
import rows_sdxl
import rows_wan21
import rows_zimage
from arch_row import Row
from detour.config.job import ModelArch

_FAMILIES = (rows_auraflow, rows_flux, rows_lumina2, rows_pixart, rows_sd, rows_sd3, rows_sdxl, rows_wan21, rows_zimage)
_BY_NAME = {row.name: row for family in _FAMILIES for row in family.ROWS}
ROWS: list[Row] = [_BY_NAME[name] for name in get_args(ModelArch) if name in _BY_NAME]

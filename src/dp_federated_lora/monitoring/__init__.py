"""What a run shows of itself: report page, statement in words, log, metrics file and progress board."""

from __future__ import annotations

"""A job, whatever its stage."""

from __future__ import annotations

from pretrain.data.preparing.encoding import encode_piece
from pretrain.data.preparing.merge import write_shard_of
from pretrain.data.preparing.sampling import sample_piece
from pretrain.data.preparing.selecting import sign_piece
from pretrain.data.preparing.tools import ENCODE, SAMPLE, SIGN, Beat, Job, Tools


def do(tools: Tools, job: Job, beat: Beat) -> None:
    """Do it, unless it is done. beat: is called with what was done since the last call."""
    if tools.is_done(job):
        return
    if job.stage == SIGN:
        sign_piece(tools, job.number, beat)
    elif job.stage == SAMPLE:
        sample_piece(tools, job.number, beat)
    elif job.stage == ENCODE:
        encode_piece(tools, job.number, beat)
    else:
        write_shard_of(tools, job.stage, job.number, beat)

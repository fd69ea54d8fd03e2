"""Files that are whole or absent, and a full disk told as such."""

import errno
import os

import pytest

from xylem import files
from xylem.errors import CheckpointError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_files_every_way_in_which_a_disk_says_that_it_is_full_is_one_message(number, tmp_path):
    for error in (OSError(number, os.strerror(number)), RuntimeError(f"write() failed: {os.strerror(number)}")):
        with pytest.raises(CheckpointError, match="the disk is full"), files.disk_full_named(tmp_path):
            raise error


def test_files_an_error_of_another_kind_is_left_as_it_is(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), files.disk_full_named(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

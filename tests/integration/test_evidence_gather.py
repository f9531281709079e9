"""Evidence leaves a container through its socket as a tar, the aggregator over mTLS, and lands in one folder."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.cli.operator import CERTIFICATE, KEY
from services.cli.run import check_sums, load_run
from services.common.ids import Role
from services.common.rpc.administer import write_tar
from tests.support.aggregator_world import CENTRE
from tests.support.fake_aggregator_for_pods import FakeAggregator, PodProcess
from tests.support.fake_federation import NAMES, federation, over
from tests.support.proxy import LosesTheFirst
from wardround.admin.v1 import admin_pb2

ADMINISTER = [sys.executable, "-m", "services.common.rpc.administer"]


def test_a_pods_audit_log_goes_through_its_socket_into_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregator = FakeAggregator(tmp_path)
    aggregator.start()
    pod = PodProcess(aggregator)
    try:
        pod.start()
        socket = ["--socket", str(pod.socket)]
        status = subprocess.run([*ADMINISTER, "status", *socket], capture_output=True, text=True, check=True)
        assert '"role": "pod"' in status.stdout
        sent = subprocess.run([*ADMINISTER, "evidence", *socket], capture_output=True, check=True).stdout
        (tmp_path / "pod.tar").write_bytes(sent)
        words = ["evidence", "add", str(tmp_path / "run"), "--role", "pod", "--id", pod.id]
        assert main([*words, "--tar", str(tmp_path / "pod.tar"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "run": str(tmp_path / "run"), "role": "pod", "id": pod.id, "files": 1,
        }  # fmt: skip
        audit = tmp_path / "run" / "evidence" / "pods" / pod.id / "audit.jsonl"
        assert b'"kind"' in audit.read_bytes()
        assert check_sums(tmp_path / "run" / "evidence") == 1
        pod.kill()
        gone = subprocess.run([*ADMINISTER, "status", *socket], capture_output=True, text=True, check=False)
        assert gone.returncode == 2
        assert gone.stderr.count("\n") == 1
    finally:
        aggregator.stop()


def test_the_aggregators_evidence_is_pulled_with_an_operators_certificate(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        leaf = whole.world.leaf(Role.OPERATOR, "olga", CENTRE)
        leaf.certificate.rename(tmp_path / CERTIFICATE)
        leaf.key.rename(tmp_path / KEY)
        words = ["evidence", "pull", str(tmp_path / "run"), "--study", str(tmp_path / "study.yaml")]
        with LosesTheFirst(whole.running.server.port) as way:
            words += ["--address", way.address, "--operator", str(tmp_path)]
            assert main([*words, "--charter", str(tmp_path / "charter.yaml")]) == 0
            assert way.lost == 1
        run = load_run(tmp_path / "run")
        assert [one.number for one in run.rounds] == [1]
        assert run.study.digest == whole.world.study.digest


def test_files_of_any_size_survive_the_tar() -> None:
    big = bytes(range(256)) * (9 << 12)
    parts = [admin_pb2.ExportEvidenceResponse(path="a/big.bin", chunk=big[:1000])]
    parts += [admin_pb2.ExportEvidenceResponse(chunk=big[1000:])]
    parts += [admin_pb2.ExportEvidenceResponse(path="empty"), admin_pb2.ExportEvidenceResponse(path="b", chunk=b"x")]
    out = io.BytesIO()
    write_tar(parts, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        found = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]  # plain files
    assert found == {"a/big.bin": big, "empty": b"", "b": b"x"}


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "link"])
def test_a_tar_that_would_write_elsewhere_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        entry = tarfile.TarInfo(name)
        if name == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry, io.BytesIO())
    words = ["evidence", "add", str(tmp_path / "run"), "--role", "pod", "--id", "ash", "--tar"]
    assert main([*words, str(tmp_path / "bad.tar")]) == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()


def test_something_else_than_a_tar_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.tar").write_text("error from server")
    words = ["evidence", "add", str(tmp_path / "run"), "--role", "hospital", "--id", "alice", "--tar"]
    assert main([*words, str(tmp_path / "no.tar")]) == 1
    assert "export it again" in capsys.readouterr().err

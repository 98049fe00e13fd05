"""The doctor: parsers on text of other machines, verdicts, and children that die on purpose."""

import errno
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from powerinfer_ext import compiler, doctor, machine, probe

WANTED = "llama-cpp-python>=0.3.36,<0.3.37"
GOOD = probe.ProbeResult(
    True, "decodes", info={"disagreement": 0.01, "system_info": "CPU : AVX2 = 1 | REPACK = 1 | "}
)
GOOD_AMX = probe.ProbeResult(
    True, "decodes", info={"disagreement": 0.01, "system_info": "CPU : AMX_INT8 = 1 | "}
)
CRASHED = probe.ProbeResult(False, "died", signal=11, info={"system_info": "CPU : AMX_INT8 = 1 | "})
GCC_12_2 = compiler.Compiler(("/usr/bin/c++",), "gcc", (12, 2, 0))
GCC_14 = compiler.Compiler(("/usr/bin/c++",), "gcc", (14, 1, 0))

SAPPHIRE_RAPIDS = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
cache size\t: 107520 KB
flags\t\t: fpu sse4_2 fma avx f16c avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes sve i8mm bf16
CPU implementer\t: 0x41
"""


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_cpuinfo() -> None:
    name, flags = machine.parse_cpuinfo(SAPPHIRE_RAPIDS)
    assert name.startswith("Intel(R) Xeon(R) Platinum 8481C")
    assert {"amx_tile", "avx512_bf16"} <= flags and "spectre_v1" not in flags
    assert "asimd" in machine.parse_cpuinfo(GRAVITON)[1]
    assert machine.parse_cpuinfo("") == ("unknown CPU", set())


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        (SAPPHIRE_RAPIDS, "ok", "amx_tile"),
        (GRAVITON, "ok", "sve"),
        ("flags : fpu sse2\n", "warn", "no vector"),
    ],
)
def test_cpu(text: str, status: str, says: str) -> None:
    check = doctor.check_cpu(text)
    assert check.status == status and says in check.detail


def test_cores() -> None:
    assert doctor.check_cores(8, 8, None).status == "ok"
    assert doctor.check_cores(8, 2, 4.0).status == "ok"
    check = doctor.check_cores(8, 8, 1.5)
    assert check.status == "warn" and "1.5" in check.detail and "1 thread" in check.remedy


def test_version() -> None:
    assert doctor.check_version("0.3.36", WANTED).status == "ok"
    for version in ("0.3.35", "0.3.37", None):
        check = doctor.check_version(version, WANTED)
        assert check.status == "fail" and WANTED in check.remedy


def test_requirement_is_the_projects() -> None:
    assert probe.version_in_range("0.3.36", doctor.requirement())
    assert not probe.version_in_range("0.3.37", doctor.requirement())


@pytest.mark.parametrize(
    ("found", "amx", "result", "status", "says"),
    [
        (GCC_12_2, False, GOOD, "ok", "amx_tile_fix.h"),
        (GCC_12_2, True, GOOD_AMX, "ok", "amx_tile_fix.h"),
        (GCC_12_2, True, CRASHED, "fail", "amx_tile_fix.h"),
        (GCC_12_2, True, GOOD, "warn", "amx_tile_fix.h"),
        (GCC_14, True, GOOD_AMX, "ok", ""),
        (GCC_14, True, GOOD, "warn", "--no-binary llama-cpp-python"),
        (None, False, GOOD, "ok", ""),
    ],
)
def test_compiler_verdicts(
    monkeypatch: pytest.MonkeyPatch,
    found: compiler.Compiler | None,
    amx: bool,
    result: probe.ProbeResult,
    status: str,
    says: str,
) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: found)
    check = doctor.check_compiler(found, amx, result, WANTED)
    assert check.status == status and says in check.remedy
    assert bool(check.remedy) == bool(says)


def test_the_installed_dependency_decodes() -> None:
    result = probe.probe_dependency()
    assert result.ok, result.reason
    assert result.info["disagreement"] <= probe.LARGEST_DISAGREEMENT
    assert doctor.check_decode(result, WANTED).status == "ok"


@pytest.mark.parametrize(
    ("name", "says"), [("SIGSEGV", "AMX"), ("SIGILL", "another CPU"), ("SIGKILL", "memory")]
)
def test_a_child_that_crashes(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: GCC_12_2)
    code = (
        "import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        'print(\'{"system_info": "CPU : AMX_INT8 = 1 | "}\', flush=True);'
        f"os.kill(os.getpid(), signal.{name})"
    )
    result = probe.probe_dependency(child(code))
    assert not result.ok and name in result.reason and says in result.reason
    assert result.info == {"system_info": "CPU : AMX_INT8 = 1 | "}
    check = doctor.check_decode(result, WANTED)
    assert check.status == "fail"
    assert str(compiler.FIX_HEADER) in check.remedy and "--no-cache-dir" in check.remedy


def test_a_child_that_fails_hangs_or_computes_nonsense() -> None:
    result = probe.probe_dependency(child("import no_such_module"))
    assert not result.ok and "No module named 'no_such_module'" in result.reason
    result = probe.probe_dependency(child("import time; time.sleep(60)"), timeout=0.2)
    assert not result.ok and "did not finish" in result.reason
    result = probe.probe_dependency(child("pass"))
    assert not result.ok and "without a result" in result.reason
    for finite, disagreement, says in (
        ("false", "NaN", "not finite"),
        ("true", "0.7", "disagree"),
        ("true", "NaN", ""),
    ):
        line = f'{{"finite": {finite}, "disagreement": {disagreement}}}'
        result = probe.probe_dependency(child(f"print({line!r})"))
        assert not result.ok and says in result.reason


def test_backend_verdicts() -> None:
    assert doctor.check_backend(child("print('0.25.3')")).detail.endswith("0.25.3")
    check = doctor.check_backend(child("raise SystemExit('ggml is too new')"))
    assert check.status == "fail" and check.detail.endswith("ggml is too new")
    check = doctor.check_backend(child("import os; os.abort()"))
    assert check.status == "fail" and "SIGABRT" in check.detail and "llama" not in check.detail


def test_the_installed_backend_passes_its_self_test() -> None:
    check = doctor.check_backend()
    assert check.status == "ok", check.detail


V1_MOUNTS = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n"
V2_MOUNTS = "/dev/vda / ext4 rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "cgroup", "expected"),
    [
        (V1_MOUNTS, "4:memory:/user/a\n1:cpu:/\n", (1, Path("/sys/fs/cgroup/memory/user/a"))),
        (V1_MOUNTS + V2_MOUNTS, "4:memory:/user/a\n0::/b\n", (1, Path("/sys/fs/cgroup/memory/user/a"))),
        (V2_MOUNTS, "0::/user.slice/x.scope\n", (2, Path("/sys/fs/cgroup/user.slice/x.scope"))),
        (V2_MOUNTS, "0::/\n", (2, Path("/sys/fs/cgroup"))),
        ("cgroup2 /odd\\040name cgroup2 rw 0 0\n", "0::/\n", (2, Path("/odd name"))),
        ("/dev/vda / ext4 rw 0 0\n", "", (0, None)),
        ("", "", (0, None)),
    ],
)
def test_cgroup_parsing(mounts: str, cgroup: str, expected: tuple[int, Path | None]) -> None:
    assert machine.parse_cgroup(mounts, cgroup) == expected


def test_cgroup_verdicts() -> None:
    assert doctor.check_cgroup(machine.MemoryCgroup(0)).status == "warn"
    limited = doctor.check_cgroup(machine.MemoryCgroup(2, Path("/"), 2 << 30, True))
    assert limited.status == "ok" and "2.0 GiB" in limited.detail
    assert "systemd-run" in doctor.check_cgroup(machine.MemoryCgroup(2, Path("/"), None, False)).remedy


def test_io_uring_verdicts() -> None:
    assert doctor.check_io_uring(0).status == "ok"
    assert "5.1" in doctor.check_io_uring(errno.ENOSYS).remedy
    assert "seccomp" in doctor.check_io_uring(errno.EPERM).detail
    assert doctor.check_io_uring(errno.ENOMEM).status == "warn"
    assert machine.io_uring_error() in (0, errno.ENOSYS, errno.EPERM, errno.EACCES)


def test_small_verdicts(tmp_path: Path) -> None:
    assert doctor.check_read_ahead(128).status == "ok"
    assert doctor.check_read_ahead(None).status == "ok"
    assert "8192" in doctor.check_read_ahead(8192).detail
    assert doctor.check_huge_pages("always [madvise] never\n").status == "ok"
    assert doctor.check_huge_pages("always madvise [never]\n").status == "warn"
    assert doctor.check_huge_pages("").status == "warn"
    assert doctor.check_free(tmp_path, 1 << 20).status == "warn"


def test_folder_that_cannot_be_written() -> None:
    check = doctor.check_direct_io(Path("/proc"))  # not even root makes files there
    assert check.status == "warn" and "/proc" in check.detail
    check = doctor.check_disk(Path("/proc"))
    assert check.status == "warn"


def test_measurements_leave_nothing_behind(tmp_path: Path) -> None:
    try:
        speeds = machine.disk_speed(tmp_path, seconds=0.01)
    except OSError as error:
        assert error.errno == errno.EINVAL  # a temporary folder on tmpfs has no O_DIRECT
    else:
        assert [(speed.block, speed.depth) for speed in speeds][0] == (4096, 1)
        assert all(speed.rate > 0 for speed in speeds)
    assert list(tmp_path.iterdir()) == []
    assert machine.available_memory() > 0


def test_output_formats_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [
        doctor.Check("a", "ok", "[fine]"),
        doctor.Check("b", "warn", "slow", "A remedy " + "that is long " * 20 + "ends here."),
    ]
    monkeypatch.setattr(doctor, "each_check", lambda folder, say=None: iter(found))
    assert doctor.run(folder=tmp_path) == 0
    assert doctor.run(json=True, folder=tmp_path) == 0
    found.append(doctor.Check("c", "fail", "broken", "Mend it."))
    capsys.readouterr()
    assert doctor.run(json=True, folder=tmp_path) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["checks"][2] == {"name": "c", "status": "fail", "detail": "broken", "remedy": "Mend it."}

    console = Console(record=True, width=60)
    doctor.render(found, console)
    text = console.export_text()
    assert "[fine]" in text  # what we found is never read as markup
    assert any(
        line.endswith("that is long ends here.") for line in text.splitlines()
    )  # one line, to be copied
    assert "1 ok, 1 to know about, 1 failed" in text

"""Files that are made to do harm: no code in them is run, and none takes memory or time for what it only claims."""

import base64
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from kpflow_dyn._checkpoint import CheckpointError, load_checkpoint
from kpflow_dyn._checkpoint.pickles import Foreign, read_pickle

MEMORY = 96 * 2**20
"""Above the limit of a small archive, 64 MB, and far below what these files claim."""


class Intruder:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def proof(tmp_path):
    """A path at which no folder may appear."""
    path = tmp_path / "proof"
    yield path
    assert not path.exists()


def weights():
    torch.manual_seed(0)
    return nn.GRU(3, 6).state_dict()


def refused(path, match=None):
    """The file is refused in words, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


OPCODES = {
    "GLOBAL and REDUCE": b"cos\nmkdir\n(V%s\ntR.",
    "INST": b"(V%s\nios\nmkdir\n.",
    "OBJ": b"(cos\nmkdir\nV%s\no.",
    "NEWOBJ": b"\x80\x02cos\nmkdir\n(V%s\nt\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nmkdir\n(V%s\nt}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(V%s\ntR.",
    "BUILD": b"cbuiltins\nexec\n(tR(V__setstate__\ncos\nmkdir\nd(V%s\ntb.",
    "PERSID": b"Pcos\n0cos\nmkdir\n(V%s\ntR.",
    "EXT1": b"\x80\x02\x82\x01(V%s\ntR.",
}


@pytest.mark.parametrize("name", OPCODES)
@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".ckpt", ".npz"])
def test_no_opcode_runs_code(tmp_path, proof, name, suffix):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(OPCODES[name] % str(proof).encode())
    with pytest.raises(CheckpointError, match=r"a damaged pickle|without any|not a checkpoint"):
        load_checkpoint(path)


def test_what_a_pickle_would_call_is_only_named(proof):
    found = read_pickle(io.BytesIO(pickle.dumps({"a": Intruder(proof), "b": [1, (2.5, None)]})))
    assert isinstance(found["a"], Foreign) and found["a"].arguments == (str(proof),)
    assert found["a"].name in ("posix.mkdir", "nt.mkdir") and found["b"] == [1, (2.5, None)]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "state_dict"])
def test_weights_beside_an_intruder_are_read(tmp_path, proof, place, new):
    content = {"state_dict": dict(weights()), "hyper_parameters": {}, "callbacks": {}}
    content[place]["intruder"] = Intruder(proof)
    torch.save(content, tmp_path / "net.ckpt", _use_new_zipfile_serialization=new)
    loaded = load_checkpoint(tmp_path / "net.ckpt")
    assert loaded.cell.hidden_size == 6 and "mkdir" in loaded.found["not made"]


def test_a_plain_pickle_of_arrays_beside_an_intruder(tmp_path, proof):
    arrays = {name: value.numpy() for name, value in weights().items()}
    for protocol in range(6):
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"params": arrays, "extra": Intruder(proof)}, protocol))
        loaded = load_checkpoint(tmp_path / "net.pkl")
        assert all(torch.equal(value, loaded.cell.state_dict()[name]) for name, value in weights().items())


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
@pytest.mark.parametrize("alone", [True, False])
def test_arrays_of_objects_are_refused(tmp_path, proof, save, alone):
    path = tmp_path / ("net.npy" if save is np.save else "net.npz")
    array = np.array([Intruder(proof), None] if alone else Intruder(proof), object)
    save(path, array, allow_pickle=True) if save is np.save else save(path, weight_hh_l0=array)
    refused(path, "an array of Python objects")


def test_an_array_of_objects_beside_weights_is_left_out(tmp_path, proof):
    arrays = {name: value.numpy() for name, value in weights().items()}
    np.savez(tmp_path / "net.npz", **arrays, extra=np.array(Intruder(proof), object))
    assert load_checkpoint(tmp_path / "net.npz").cell.hidden_size == 6


def test_the_pickles_of_stable_baselines_are_not_read(tmp_path, proof):
    text = base64.b64encode(pickle.dumps(Intruder(proof))).decode()
    policy = io.BytesIO()
    torch.save({f"lstm_actor.{name}": value for name, value in weights().items()}, policy)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": {":type:": "x", ":serialized:": text}}))
        archive.writestr("policy.pth", policy.getvalue())
        archive.writestr("policy.optimizer.pth", pickle.dumps(Intruder(proof)))
    loaded = load_checkpoint(tmp_path / "model.zip")
    assert (loaded.found["file"], loaded.prefix) == ("stable-baselines3", "lstm_actor.")


def test_old_tar_files_and_compressed_pickles_are_refused(tmp_path, proof):
    data = pickle.dumps(Intruder(proof))
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "net.joblib").write_bytes(zlib.compress(data))
    (tmp_path / "net.pkl").write_bytes(b"\x1f\x8b" + data)
    for name in ("old.pt", "net.joblib", "net.pkl"):
        refused(tmp_path / name, "not a checkpoint that can be read")


def test_names_are_only_names(tmp_path, proof):
    from safetensors.torch import save_file

    code = f"__import__('os').mkdir('{proof}')"
    save_file({code: torch.zeros(2, 2), "\x1b[2J": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "net.safetensors")
    assert "\x1b" not in str(caught.value)


def archive_of(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            with archive.open(name, "w") as member:
                for piece in [data] if isinstance(data, bytes) else data:
                    member.write(piece)
    return path


def zeros(size):
    return (bytes(2**20) for _ in range(size // 2**20))


@pytest.mark.parametrize("name", ["net/data.pkl", "a.npy", "policy.pth", "model.weights.h5"])
def test_zip_bombs_are_refused(tmp_path, name):
    refused(archive_of(tmp_path / "bomb.zip", {name: zeros(2**27)}), "a zip bomb")


def test_a_bomb_in_an_archive_in_an_archive(tmp_path):
    inner = archive_of(tmp_path / "inner", {"net/data.pkl": zeros(2**27)})
    refused(archive_of(tmp_path / "bomb.zip", {"policy.pth": inner.read_bytes()}), "a zip bomb")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    path = archive_of(tmp_path / "bomb.npz", {"a.npy": bytes(2**20)}, zipfile.ZIP_STORED)
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[place:end]
    entries = b"".join(entry.replace(b"a.npy", f"{number}.npy".encode()) for number in range(9))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, len(entries), place, 0)
    path.write_bytes(data[:place] + entries + tail)
    refused(path, "a zip bomb")


@pytest.mark.parametrize("name", ["/etc/data.pkl", "../data.pkl", "a/../../data.pkl", "C:\\data.pkl", "..\\data.pkl"])
def test_members_outside_of_the_archive_are_refused(tmp_path, name):
    refused(archive_of(tmp_path / "net.pt", {name: b"."}), "outside of it")


def test_links_in_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        link = zipfile.ZipInfo("net/data.pkl")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "net.pt", "is a link")


def npy_claiming(shape, dtype="<f4", length=None):
    """An array of numpy with this header, and four bytes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header) if length is None else length) + header + bytes(4)


CLAIMS = {
    "npy, a header of 2 GB": npy_claiming((1,), length=2**31 - 1),
    "npy, a shape of 4 TB": npy_claiming((2**40,)),
    "npy, a shape beyond integers": npy_claiming((2**62, 2**62)),
    "npy, a negative shape": npy_claiming((-1, -4)),
    "npy, a deep header": npy_claiming("(" * 9_000),
    "npy, a record with objects": npy_claiming((1,), dtype="O"),
    "safetensors, a header of 2 GB": struct.pack("<Q", 2**31) + b"{" + bytes(64),
    "safetensors, a tensor beyond the file": struct.pack("<Q", 80)
    + json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode().ljust(80),
    "msgpack, bytes of 2 GB": b"\x81\xa1a\xc6\x7f\xff\xff\xff" + bytes(8),
    "msgpack, an array of 4 billion": b"\x81\xa1a\xdd\xff\xff\xff\xff" + bytes(8),
    "msgpack, arrays in arrays": b"\x81\xa1a" + b"\xdd\x00\x0f\x00\x00" * 400,
    "msgpack, a map of 4 billion": b"\xdf\xff\xff\xff\xff" + bytes(8),
    "msgpack, an array of flax beyond its bytes": b"\x81\xa1a\xc7\x13\x01\x93\x92\xce\x7f\xff\xff\xff\x02\xa7float32"
    + b"\xc4\x00",
    "pickle, bytes of 2 GB": b"\x80\x04\x8e" + struct.pack("<Q", 2**31) + b"a.",
    "pickle, bytes of 8 EB": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"a.",
    "pickle, a memo of 4 billion": b"\x80\x04}r\xff\xff\xff\xff.",
    "pickle, a frame of 2 GB": b"\x80\x04\x95" + struct.pack("<Q", 2**31) + b"}.",
    "pickle, lists in lists": b"\x80\x04" + b"]" * 3000 + b"a" * 2999 + b".",
    "pickle, a number of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "pickle, a list of itself": b"\x80\x04]\x94h\x00a.",
    "pickle, doubled thirty times": b"\x80\x04]" + b"".join(b"\x94](h%ch%ce" % (n, n) for n in range(30)) + b".",
    "pickle, a key of tuples": b"\x80\x04}N\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(40)) + b"Ns.",
    "torch.save of old, a storage of 8 EB": pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({}, 2)
    + b"\x80\x02}(X\x01\x00\x00\x00a(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    + b"X\x03\x00\x00\x00cpuK\x01NtQsu."
    + pickle.dumps(["0"], 2)
    + struct.pack("<q", 2**60)
    + bytes(8),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_only_claimed_takes_no_memory(tmp_path, name):
    suffix = ".npy" if name.startswith("npy") else ".bin"
    path = tmp_path / f"net{suffix}"
    path.write_bytes(CLAIMS[name])
    refused(path)


def test_a_header_of_2_gb_that_is_there(tmp_path):
    """The file is sparse: it has no blocks on the disk for its zeros."""
    npy, safetensors = npy_claiming((1,), length=2**31 - 1), struct.pack("<Q", 2**31) + b"{"
    for name, start in {"net.safetensors": safetensors, "net.npy": npy}.items():
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(2**31 + 100)
        refused(tmp_path / name)


def torch_file(path, arguments, size=64):
    """A file of torch.save with one tensor of these arguments on a storage of some bytes."""
    offset, shape, strides = arguments
    body = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
    body += b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(4) + b"tQ"
    body += number(offset) + tuple_of(shape) + tuple_of(strides) + b"\x89}tRs."
    return archive_of(path, {"net/data.pkl": body, "net/data/0": bytes(size)}, zipfile.ZIP_STORED)


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tuple_of(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (2**40,), (1,)),
        (0, (2**31, 2**31), (2**31, 1)),
        (0, (4, 4), (5, 1)),
        (0, (2, 2), (2**62, 1)),
        (13, (4,), (1,)),
        (2**63, (1,), (1,)),
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (0, (4,), (-1,)),
        (0, (2**30,), (0,)),
        (0, (4, 4), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, arguments):
    refused(torch_file(tmp_path / "net.pt", arguments), "damaged")


def test_a_tensor_within_its_storage_is_read(tmp_path):
    from kpflow_dyn._checkpoint.files import read

    found = read(torch_file(tmp_path / "net.pt", (1, (3, 2), (1, 4)))).tree
    assert torch.equal(found["a"], torch.zeros(3, 2))


def test_a_file_of_instructions_alone(tmp_path, monkeypatch):
    from kpflow_dyn._checkpoint import pickles

    monkeypatch.setattr(pickles, "OPCODES", 1000)
    (tmp_path / "net.pkl").write_bytes(b"\x80\x04" + b"]" * 5000 + b".")
    refused(tmp_path / "net.pkl", "more than 1,000 instructions")


@pytest.mark.parametrize(
    ("method", "size"), [(zipfile.ZIP_DEFLATED, 128), (zipfile.ZIP_BZIP2, 1), (zipfile.ZIP_LZMA, 1)]
)
def test_a_member_that_holds_more_than_it_says(tmp_path, method, size):
    """Its size in the directory is a lie; unpacked at once it would fill the memory."""
    path = tmp_path / "lie.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", bytes(size * 2**20))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", size * 2**20), struct.pack("<I", 100)))
    refused(path)


def calls_with_one_list():
    """3,000 calls with the same list of 100,000 elements, never copied."""
    head = b"\x80\x04](" + b"N" * 100_000 + b"e\x94("
    return head + b"ctorch\nadd\nh\x00R" * 3_000 + b"l."


def sets():
    return b"\x80\x04(" + b"\x8f" * 450_000 + b"l."


def keys_within_keys():
    """Each key is a million letters, and all those around a tensor would make its name."""
    key = b"X" + struct.pack("<I", 10**6) + b"k" * 10**6 + b"\x94"
    return b"\x80\x04}" + key + b"}h\x00" * 300 + b"K\x01" + b"s" * 301 + b"."


def objects_of_one_state():
    """Objects that share a state of 100,000 attributes, which would be copied for each."""
    items = b"".join(b"X\x05\x00\x00\x00%05dK\x01" % n for n in range(100_000))
    return b"\x80\x04}(" + items + b"u\x94(" + b"cm\nC\n)\x81h\x00b" * 2_000 + b"l."


@pytest.mark.parametrize("content", [calls_with_one_list, sets, keys_within_keys, objects_of_one_state])
def test_small_pickles_that_would_grow(tmp_path, content):
    path = tmp_path / "small.pkl"
    path.write_bytes(content())
    refused(path)


def test_groups_of_hdf5_that_hold_themselves(tmp_path):
    import h5py

    with h5py.File(tmp_path / "round.h5", "w") as file:
        file["a"] = file["/"]
        file["b"] = file["/"]
    refused(tmp_path / "round.h5", "member of itself")


@pytest.mark.parametrize(
    "said", [b"\x80\x04)R.", b"\x80\x04N)\x81.", b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n)R."]
)
def test_calls_without_arguments_are_damage(tmp_path, said):
    path = tmp_path / "few.pkl"
    path.write_bytes(said)
    refused(path)


def test_links_of_hdf5_to_other_files_are_not_followed(tmp_path):
    import h5py

    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["weight"] = np.ones((6, 6))
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file["weight_hh"] = h5py.ExternalLink("secret.h5", "weight")
        file["soft"] = h5py.SoftLink("/")
        file.create_dataset("huge", shape=(2**40,), dtype="f4", chunks=(1024,))
    refused(tmp_path / "net.h5", "which the file does not hold")


def test_files_of_trials_do_no_harm_either(tmp_path, proof):
    from kpflow_dyn.tasks import make_task

    archive_of(tmp_path / "bomb.npz", {"inputs.npy": zeros(2**27)})
    archive_of(tmp_path / "claim.npz", {"inputs.npy": npy_claiming((2**40,))})
    np.savez(tmp_path / "objects.npz", inputs=np.array(Intruder(proof), object))
    for name, words in {"bomb": "a zip bomb", "claim": "cannot be read", "objects": "cannot be read"}.items():
        with pytest.raises(ValueError, match=words):
            make_task(str(tmp_path / f"{name}.npz"))

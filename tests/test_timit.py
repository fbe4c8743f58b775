"""timit: Kaldi directories in their true formats, spliced as Kaldi does."""

import gzip
import struct

import kaldiio
import numpy as np
import pytest

from large_batch import datasets
from large_batch.errors import UserError
from large_batch.minimizers import Minimizers
from large_batch.networks import Network
from large_batch.objective import Objective
from large_batch.objectives import preparation
from large_batch.recipes import Recipe
from network_zoo import classifier

LENGTHS = {"fadg0_sa1": 7, "fadg0_sx2": 1, "mabc1_si3": 12}  # a frame alone is its own neighbour


def matrix_bytes(matrix, kind):
    """A matrix as Kaldi writes it, binary (little-endian floats or doubles) or as text."""
    if kind == "text":
        rows = "\n".join("  " + " ".join(repr(float(number)) for number in row) + " " for row in matrix)
        return f" [\n{rows}]\n".encode()
    mark, dtype = {"float": (b"FM ", "<f4"), "double": (b"DM ", "<f8")}[kind]
    sizes = b"".join(b"\4" + struct.pack("<i", size) for size in matrix.shape)
    return b"\0B" + mark + sizes + matrix.astype(dtype).tobytes()


def ids_bytes(ids, kind):
    if kind == "text":
        return (" ".join(map(str, ids)) + " \n").encode()
    return b"\0B" + b"".join(b"\4" + struct.pack("<i", number) for number in (len(ids), *ids))


def write_scp(path, matrices, kind="float"):
    """Write an archive beside a script file that lists it."""
    ark = path.with_suffix(".ark")
    if kind.isdecimal():  # one of Kaldi's methods of compression
        kaldiio.save_ark(str(ark), matrices, scp=str(path), compression_method=int(kind))
        return
    content, lines = b"", []
    for name, matrix in matrices.items():
        content += name.encode() + b" "
        lines.append(f"{name} {ark.name}:{len(content)}\n")
        content += matrix_bytes(matrix, kind)
    ark.write_bytes(content)
    path.write_text("".join(lines))


def write_half(folder, seed, kind="float", ids_kind="binary", lengths=LENGTHS):
    """Write features and an alignment in two packed parts; return both."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    matrices = {name: rng.normal(size=(length, 40)).astype(np.float32) for name, length in lengths.items()}
    alignment = {name: rng.integers(0, 50, length) for name, length in lengths.items()}
    write_scp(folder / "feats.scp", matrices, kind)
    for part in (0, 1):
        lines = [name.encode() + b" " + ids_bytes(ids, ids_kind) for name, ids in list(alignment.items())[part::2]]
        (folder / f"ali-pdf.{part + 1}.gz").write_bytes(gzip.compress(b"".join(lines)))
    return matrices, alignment


def spliced(matrices):
    """Each frame with four on both sides, the outermost ones repeated."""
    rows = []
    for matrix in matrices.values():
        padded = np.pad(matrix, ((4, 4), (0, 0)), mode="edge")
        rows += [padded[t : t + 9].ravel() for t in range(len(matrix))]
    return np.array(rows, np.float32)


def dense(data, half):
    return data.frames.splice(getattr(data, f"x_{half}")).numpy()


@pytest.mark.parametrize("kind", ["float", "double", "text", "2", "3", "5"])
def test_every_format_of_features(tmp_path, capsys, kind):
    expected = {half: write_half(tmp_path / half, seed, kind) for seed, half in enumerate(("train", "test"))}
    data = datasets.load_data("timit", tmp_path).reshape_to((360,))
    # 16 bits of a range of about 7, 8 bits of it, and 8 bits between quantiles.
    tolerance = {"3": 1e-4, "5": 0.03, "2": 0.1}.get(kind, 1e-7)
    for half, (matrices, alignment) in expected.items():
        np.testing.assert_allclose(dense(data, half), spliced(matrices), rtol=0, atol=tolerance)
        np.testing.assert_array_equal(getattr(data, f"y_{half}"), np.concatenate(list(alignment.values())))
    assert data.classes == 1 + max(ids.max() for _, alignment in expected.values() for ids in alignment.values())
    said = capsys.readouterr().err
    assert f"Kaldi directory {tmp_path}, train: 3 utterances, 20 frames, none dropped; test: 3 utterances" in said


@pytest.mark.parametrize("name", ["ali-pdf.ark", "ali-pdf.1"])
@pytest.mark.parametrize("ids_kind", ["text", "binary"])
def test_every_format_of_alignments(tmp_path, name, ids_kind):
    for half in ("train", "test"):
        _, alignment = write_half(tmp_path / half, 0)
        for part in (tmp_path / half).glob("ali-pdf*"):
            part.unlink()
        content = b"".join(utterance.encode() + b" " + ids_bytes(ids, ids_kind) for utterance, ids in alignment.items())
        (tmp_path / half / name).write_bytes(content)
    data = datasets.load_data("timit", tmp_path)
    np.testing.assert_array_equal(data.y_train, np.concatenate(list(alignment.values())))


def test_dropped_utterances_are_reported(tmp_path, capsys):
    write_half(tmp_path / "test", 1)
    matrices, alignment = write_half(tmp_path / "train", 0, lengths={f"u{i}": 3 + i for i in range(6)})
    del alignment["u1"]
    alignment["u2"] = alignment["u2"][:-1]
    (tmp_path / "train" / "ali-pdf.2.gz").unlink()
    content = b"".join(name.encode() + b" " + ids_bytes(ids, "text") for name, ids in alignment.items())
    (tmp_path / "train" / "ali-pdf.1.gz").write_bytes(gzip.compress(content))
    write_scp(tmp_path / "train" / "cmvn.scp", {f"u{i}": np.ones((2, 41)) for i in range(5)}, "double")
    data = datasets.load_data("timit", tmp_path)
    said = capsys.readouterr().err
    assert (
        "train: 3 utterances, 16 frames, 3 dropped (1 without an alignment, 1 with an alignment of another length"
        in said
    )
    assert ", 1 without CMVN statistics: u1, u2, u5)" in said
    kept = {name: matrices[name] - 1 for name in ("u0", "u3", "u4")}
    np.testing.assert_array_equal(dense(data, "train"), spliced(kept))


@pytest.mark.parametrize("options", ["", "--norm-vars=true", "--norm-vars\n", "--norm-means=false --norm-vars=false"])
def test_statistics_of_speakers_are_applied(tmp_path, options):
    for half in ("train", "test"):
        matrices, _ = write_half(tmp_path / half, 0)
        speakers = {name: name.partition("_")[0] for name in matrices}
        (tmp_path / half / "utt2spk").write_text("".join(f"{name} {who}\n" for name, who in speakers.items()))
        (tmp_path / half / "cmvn_opts").write_text(options)
        statistics, expected = {}, {}
        for speaker in dict.fromkeys(speakers.values()):
            own = np.concatenate([matrix for name, matrix in matrices.items() if speakers[name] == speaker]).astype(
                float
            )
            statistics[speaker] = np.block([[own.sum(axis=0), len(own)], [(own**2).sum(axis=0), 0]])
            for name in (name for name in matrices if speakers[name] == speaker):
                mean = 0 if "means=false" in options else own.mean(axis=0)
                expected[name] = (matrices[name] - mean) / (
                    own.std(axis=0) if "vars" in options and "vars=f" not in options else 1
                )
        write_scp(tmp_path / half / "cmvn.scp", statistics, "double")
    np.testing.assert_allclose(
        dense(datasets.load_data("timit", tmp_path), "train"), spliced(expected), rtol=1e-5, atol=1e-6
    )


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def spoil_scp(text):
    return lambda folder: (folder / "feats.scp").write_text(text)


def pickled(folder):
    kaldiio.save_ark(str(folder / "feats.ark"), {"u": Trap()}, scp=str(folder / "feats.scp"), write_function="pickle")


def refeature(matrices):
    return lambda folder: write_scp(folder / "feats.scp", matrices)


def skip(folder):
    write_scp(folder / "cmvn.scp", {"u": np.ones((2, 41))})
    (folder / "cmvn_opts").write_text("--norm-vars=false --skip-dims=13")


def cut(folder):
    (folder / "feats.ark").write_bytes((folder / "feats.ark").read_bytes()[:500])


def spoil_gz(change):
    def spoil(folder):
        path = folder / "ali-pdf.1.gz"
        path.write_bytes(change(path.read_bytes()))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_scp("u touch trap |\n"), "u in .*feats.scp is a pipe; write its matrices to a file with Kaldi's copy-f"),
        (spoil_scp("u | touch trap\n"), "is a pipe"),
        (spoil_scp("u -\n"), "is a pipe"),
        (spoil_scp("u\n"), "u in .*feats.scp has no place of its matrix"),
        (spoil_scp("u missing.ark:3\n"), "No such file"),
        (spoil_scp("u ali-pdf.1.gz:0\n"), "is no matrix or vector of Kaldi"),
        (pickled, "u in .*feats.scp is no matrix or vector of Kaldi"),
        (cut, "fadg0_sa1 in .*feats.scp cannot be read"),
        (refeature({"u": np.ones((3, 39))}), r"shape \(3, 39\) instead of \(frames, 40\)"),
        (refeature({"u": np.ones((3, 40))}), "no utterance to use: 1 dropped"),
        (refeature({name: np.full((n, 40), np.nan) for name, n in LENGTHS.items()}), "NaN"),
        (lambda folder: [path.unlink() for path in folder.glob("ali-pdf*")], "has no alignment ali-pdf.* ali-to-pdf"),
        (skip, "cmvn_opts has --skip-dims=13; known are --norm-means, "),
        (lambda folder: (folder / "ali-pdf.1.gz").write_bytes(b"text"), "Not a gzipped file"),
        (spoil_gz(lambda content: content[:-20]), "ali-pdf.1.gz is damaged"),
        (spoil_gz(lambda content: content[:20] + b"!" * 20 + content[40:]), "ali-pdf.1.gz is damaged"),
    ],
)
def test_what_cannot_be_used(tmp_path, monkeypatch, spoil, words):
    monkeypatch.chdir(tmp_path)
    for half in ("train", "test"):
        write_half(tmp_path / half, 0)
    spoil(tmp_path / "train")
    with pytest.raises(UserError, match=f"The Kaldi directory .* cannot be used: .*{words}") as refused:
        datasets.load_data("timit", tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "trap").exists()


def test_rows_of_a_matrix(tmp_path):
    """A range in a script file names first and last row."""
    for half in ("train", "test"):
        matrices, _ = write_half(tmp_path / half, 0, lengths={"u": 5})
        path = tmp_path / half / "feats.scp"
        path.write_text(path.read_text().replace("\n", "[1:3]\n"))
        (tmp_path / half / "ali-pdf.1.gz").write_bytes(gzip.compress(b"u 1 2 3\n"))
    assert np.array_equal(dense(datasets.load_data("timit", tmp_path), "train"), spliced({"u": matrices["u"][1:4]}))


def test_the_same_bits_as_spliced_data(tmp_path):
    """Training, and the objective in chunks, on frames and on a file of spliced samples."""
    lengths, arrays = {f"u{i}": 80 + 9 * i for i in range(9)}, {}
    for seed, half in enumerate(("train", "test")):
        matrices, alignment = write_half(tmp_path / half, seed, lengths=lengths)
        arrays |= {f"x_{half}": spliced(matrices), f"y_{half}": np.concatenate(list(alignment.values()))}
    np.savez(tmp_path / "spliced.npz", **arrays)
    network = Network("small", classifier(lambda parts: parts.dense(16)), "timit", (360,), 50)
    ends = []
    for name in ("timit", str(tmp_path / "spliced.npz")):
        data = datasets.load_data(name, tmp_path).reshape_to((360,))
        recipe = Recipe(network="small", dataset=data.name, data_digest=data.digest, batch_size=600, epochs=2, seed=0)
        minimizer = Minimizers(network, data, tmp_path / "runs").train(recipe, test_history=True)
        objective = Objective(
            network.build(classes=data.classes), data.x_train, data.y_train, chunk=600, prepare=preparation(data)
        )
        loss, gradient = objective.value_and_gradient(minimizer.weights)
        ends.append((minimizer.weights, minimizer.history, loss, gradient, objective.evaluate(minimizer.weights)))
    (weights, history, loss, gradient, found), (*others,) = ends
    assert history == others[1] and loss == others[2] and found == others[4]
    assert np.array_equal(weights, others[0]) and np.array_equal(gradient, others[3])

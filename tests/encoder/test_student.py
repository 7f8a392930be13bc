"""The student in closed form."""

import torch

from pipeline.encoder.student import Student, new_student
from pipeline.train.losses import alignment_sum
from tests.conftest import tiny_model


def test_embedding_is_mean_of_projected_soft_prompts() -> None:
    student = Student(hidden=2, width=1, compression_tokens=2)
    with torch.no_grad():
        student.reconstruction.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        student.reconstruction.bias.fill_(1.0)
        student.alignment.weight.copy_(torch.tensor([[1.0, 10.0]]))
        student.alignment.bias.fill_(0.5)
    states = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    soft = student.soft_prompts(states)
    assert soft.tolist() == [[[3.0, 4.0], [5.0, 1.0]]]
    assert student.embedding(soft).tolist() == [[((3 + 40) + (5 + 10)) / 2 + 0.5]]
    assert [part.tolist() for part in student(states)] == [soft.tolist(), student.embedding(soft).tolist()]
    assert student.feature(states).tolist() == [[1.5, 0.5]]
    # A mean in front is what the embedding is made of; the soft prompts stay those of the tokens.
    pooled = torch.cat([torch.tensor([[[3.0, 2.0]]]), states], dim=1)
    assert [part.tolist() for part in student(pooled)] == [soft.tolist(), [[(7 + 70) + 0.5]]]
    assert student.feature(pooled).tolist() == [[3.0, 2.0]]


def test_alignment_reductions_differ_by_the_width() -> None:
    embeddings, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert alignment_sum(embeddings, targets, "sum") == 5.0
    assert alignment_sum(embeddings, targets, "mean") == 2.5


def test_new_student_depends_on_its_seed_alone() -> None:
    backbone = tiny_model()
    first, second, other = (
        new_student(backbone, 7, compression_tokens=3, thought_tokens=2, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tokens"], other["tokens"])
    assert first["tokens"].shape == (5, 32)


def test_gemma_tokens_start_at_the_scaled_rows() -> None:
    """Gemma multiplies embeddings by sqrt(d) on the way in; new rows must live on that scale."""
    backbone = tiny_model("gemma3")
    student = new_student(backbone, 4, compression_tokens=64, thought_tokens=0, seed=0)
    rows = backbone.get_input_embeddings()(torch.arange(260))
    assert (student.tokens[:, None] == rows).all(-1).any(1).all()
    assert not (student.tokens[:, None] == backbone.get_input_embeddings().weight).all(-1).any()
    assert len(student.tokens.detach().unique(dim=0)) == 64

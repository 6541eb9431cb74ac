"""Train one small network twice, with torch.nn's batch norm and with batchnorm_cuda's, and compare.

Real data (scikit-learn's 1797 handwritten digits), the same seed and the same order of images, so
that the two runs differ in nothing but the batch norm layers. Uses the GPU where there is one;
elsewhere the CUDA kernels run on the CPU, through the host model of CUDA that their tests use.

    python examples/train_digits.py [--epochs 8] [--device auto|cpu|cuda] [--quick]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import choose_device, parser_of_two_runs, repeat_to_the_bit
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import batchnorm_cuda

MIN_ACCURACY = 0.95

# Both implementations add the same float32 numbers in different orders, and training amplifies what
# one step differs by. SiLU keeps that amplification small: with ReLU a last-bit difference can
# switch a unit off and move the loss by 1e-3. Measured over 8 epochs and 20 seeds, torch's layers
# against a copy that only sums in another order: at most 8.3e-7. Faults planted in that copy
# (weight applied twice in the gradient, the x-hat term or all cross terms of the gradient dropped,
# biased running variance): at least 2.3e-3. The bound lies between.
MAX_LOSS_DIFFERENCE = 1e-4


def parse_args():
    parser = parser_of_two_runs(__doc__.splitlines()[0], batch_size=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/train_digits.png"))
    parser.add_argument("--quick", action="store_true", help="3 epochs, whatever --epochs says")
    args = parser.parse_args()
    if args.quick:
        args.epochs = 3
    if args.epochs < 1 or args.batch_size < 2:
        parser.error("--epochs must be at least 1 and --batch-size at least 2")
    return args


def load_data(device):
    """Digits as [1797, 1, 8, 8], standardised by the training part's mean and deviation."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    mean, std = train_x.mean(), train_x.std()

    def images(x):
        return ((x - mean) / std).float().view(-1, 1, 8, 8).to(device)

    return images(train_x), train_y.to(device), images(test_x), test_y.to(device)


def make_network(norm2d, norm1d):
    def block(inputs, outputs, stride):
        # No bias: the batch norm that follows would subtract it again.
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, norm2d(outputs), nn.SiLU())

    return nn.Sequential(
        block(1, 16, 1),  # 16 x 8 x 8
        block(16, 32, 2),  # 32 x 4 x 4
        block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        norm1d(32),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def evaluate(network, images, labels):
    network.eval()
    logits = network(images)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy


def train(title, norms, data, args):
    """Returns [epochs, 3]: training loss, test loss and test accuracy."""
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(args.seed)
    network = make_network(*norms).to(train_x.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    order = torch.Generator().manual_seed(args.seed)
    history = []
    steps = args.epochs * -(-len(train_x) // args.batch_size)
    with tqdm(total=steps, desc=f"{title:>14}", unit="step") as progress:
        for _ in range(args.epochs):
            network.train()
            total = 0.0
            for batch in torch.randperm(len(train_x), generator=order).split(args.batch_size):
                images, labels = train_x[batch], train_y[batch]
                loss = F.cross_entropy(network(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
                progress.update()
            history.append((total / len(train_x), *evaluate(network, test_x, test_y)))
            progress.set_postfix_str(f"loss {history[-1][0]:.4f}, test {history[-1][2]:.2%}")
    return torch.tensor(history)


def print_table(theirs, ours):
    print(f"\n{'training loss':>24}{'test loss':>20}{'test accuracy':>22}")
    print("epoch " + 3 * f"{'torch':>9}{'ours':>9}  ")
    for epoch, row in enumerate(torch.stack([theirs, ours], dim=2).flatten(1).tolist(), 1):
        losses = "  ".join(f"{a:9.5f}{b:9.5f}" for a, b in (row[0:2], row[2:4]))
        print(f"{epoch:5} {losses}  {row[4]:9.2%}{row[5]:9.2%}")


def save_plot(theirs, ours, path):
    import matplotlib  # here: examples that borrow the data from this file draw nothing

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    epochs = range(1, len(theirs) + 1)
    for i, title in enumerate(("training loss", "test loss", "test accuracy")):
        axes[i].plot(epochs, theirs[:, i], lw=5, alpha=0.35, label="torch.nn")
        axes[i].plot(epochs, ours[:, i], "k--", lw=1.2, label="batchnorm_cuda")
        axes[i].set(title=title, xlabel="epoch")
        axes[i].xaxis.get_major_locator().set_params(integer=True)
        axes[i].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    args = parse_args()
    device = choose_device(args.device, emulate=True)
    repeat_to_the_bit()
    data = load_data(device)
    if len(data[0]) % args.batch_size == 1:
        sys.exit("error: this --batch-size leaves a last batch of one image: no variance to take")
    if batchnorm_cuda.backend_for(data[0]) == "aten":
        sys.exit("error: batchnorm_cuda chose torch operators, so its kernels would not be tested")
    # The first use may compile the kernels: here, not under the progress bar.
    batchnorm_cuda.batch_norm(data[0][:2], None, None, training=True)

    theirs = train("torch.nn", (nn.BatchNorm2d, nn.BatchNorm1d), data, args)
    our_norms = (batchnorm_cuda.BatchNorm2d, batchnorm_cuda.BatchNorm1d)
    ours = train("batchnorm_cuda", our_norms, data, args)
    print_table(theirs, ours)
    save_plot(theirs, ours, args.out)

    difference = (theirs - ours).abs()
    loss_gap, accuracy_gap = difference[:, :2].max().item(), difference[:, 2].max().item()
    accuracy = ours[-1, 2].item()
    print(f"\nlargest difference: loss {loss_gap:.1e}, accuracy {accuracy_gap:.2%}")
    print(f"curves in {args.out}")
    # Negated, so that a NaN fails too.
    if not loss_gap <= MAX_LOSS_DIFFERENCE:
        sys.exit(f"FAILED: losses differ by {loss_gap:.1e}, bound {MAX_LOSS_DIFFERENCE:.0e}")
    if not accuracy > MIN_ACCURACY:
        sys.exit(f"FAILED: final test accuracy {accuracy:.2%}, expected > {MIN_ACCURACY:.0%}")
    print(f"OK: accuracy {accuracy:.2%}, losses within {MAX_LOSS_DIFFERENCE:.0e} of torch.nn's")


if __name__ == "__main__":
    main()

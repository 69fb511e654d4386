"""The selections by their papers' formulas, in float64, row by row, for the rows of all processes together."""

import numpy as np


def one_hot(label, classes):
    return np.eye(classes)[label]


class Fixed:
    def __init__(self, threshold):
        self.threshold = threshold

    def step(self, p, labeled, index):
        weights = [float(row.max() >= self.threshold) for row in p]
        return [one_hot(row.argmax(), len(row)) for row in p], weights


class TopK:
    def __init__(self, k, threshold=0.0):
        self.k, self.threshold = k, threshold

    def step(self, p, labeled, index):
        ranked = sorted(range(len(p)), key=lambda row: (-p[row].max(), index[row]))
        taken, counts = set(), {}
        for row in ranked:
            label = p[row].argmax()
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= self.k and p[row].max() >= self.threshold:
                taken.add(row)
        return [one_hot(row.argmax(), len(row)) for row in p], [float(row in taken) for row in range(len(p))]


class Flex:
    """tau * M(beta_c), M(beta) = beta / (2 - beta), beta_c = sigma_c / max(max sigma, N - sum sigma)."""

    def __init__(self, threshold, pool):
        self.threshold, self.pool, self.last = threshold, pool, {}

    def step(self, p, labeled, index):
        targets, weights, before = [], [], dict(self.last)
        for row, sample in zip(p, index, strict=True):
            sigma = [[*before.values()].count(c) for c in range(len(row))]
            beta = [s / max(*sigma, self.pool - sum(sigma)) for s in sigma]
            label = row.argmax()
            targets.append(one_hot(label, len(row)))
            weights.append(float(row.max() >= self.threshold * beta[label] / (2 - beta[label])))
            if row.max() >= self.threshold:
                self.last[sample] = label
        return targets, weights


class Mean:
    def __init__(self, momentum, start):
        self.momentum, self.value = momentum, start

    def move(self, rows):
        if len(rows):
            self.value = self.momentum * self.value + (1 - self.momentum) * np.mean(rows, axis=0)
        return self.value


def norm(values):
    return values / values.sum()


class Free:
    def __init__(self, momentum, fairness_weight, classes):
        self.w = fairness_weight
        self.tau = Mean(momentum, 1 / classes)
        self.p, self.h = (Mean(momentum, np.full(classes, 1 / classes)) for _ in range(2))

    def step(self, p, labeled, index):
        tau = self.tau.move([row.max() for row in p])
        shares = self.p.move(p)
        targets = [one_hot(row.argmax(), len(row)) for row in p]
        self.h.move(targets)
        return targets, [float(row.max() >= tau * shares[row.argmax()] / shares.max()) for row in p]

    def regularizer(self, strong, weight):
        """w * sum_c SN(p~ / h~) log SN(mean p / hist p), over the accepted rows."""
        accepted = [row for row, w in zip(strong, weight, strict=True) if w]
        if not accepted:
            return 0.0
        mean = np.mean(accepted, axis=0)
        shares = np.mean([one_hot(row.argmax(), len(row)) for row in accepted], axis=0)
        quotient = np.array([m / s if s else 0.0 for m, s in zip(mean, shares, strict=True)])
        return self.w * (norm(self.p.value / self.h.value) * np.log(norm(quotient) + 1e-12)).sum()


class Align:
    def __init__(self, momentum, target, classes):
        uniform = np.full(classes, 1 / classes)
        self.found, self.wanted, self.is_labeled = Mean(momentum, uniform), Mean(momentum, uniform), target == "labeled"

    def __call__(self, p, labeled):
        found = self.found.move(p)
        wanted = self.wanted.move(labeled) if self.is_labeled else self.wanted.value
        return [norm(row * (wanted + 1e-6) / (found + 1e-6)) for row in p]


class Aligned:
    def __init__(self, inner, momentum, target, classes):
        self.inner, self.align = inner, Align(momentum, target, classes)

    def step(self, p, labeled, index):
        return self.inner.step(self.align(p, labeled), labeled, index)

    def regularizer(self, strong, weight):
        return self.inner.regularizer(strong, weight)


class Ada:
    def __init__(self, share, momentum, classes):
        self.share, self.align = share, Align(momentum, "labeled", classes)

    def step(self, p, labeled, index):
        aligned = self.align(p, labeled)
        threshold = self.share * np.mean([row.max() for row in labeled]) if len(labeled) else np.inf
        targets = [one_hot(row.argmax(), len(row)) for row in aligned]
        return targets, [float(row.max() >= threshold) for row in aligned]


class Soft:
    def __init__(self, n, momentum, align, classes):
        self.n, self.align = n, Align(momentum, "uniform", classes) if align else None
        self.mean, self.variance = Mean(momentum, 1 / classes), Mean(momentum, 1.0)

    def step(self, p, labeled, index):
        targets = [one_hot(row.argmax(), len(row)) for row in p]
        confidence = [row.max() for row in (self.align(p, labeled) if self.align else p)]
        mu = self.mean.move(confidence)
        variance = self.variance.move([np.var(confidence, ddof=1)] if len(confidence) > 1 else [])
        return targets, [np.exp(-(min(c - mu, 0) ** 2) / (2 * variance / self.n**2)) for c in confidence]


class Sharp:
    def __init__(self, inner, temperature):
        self.inner, self.temperature = inner, temperature

    def step(self, p, labeled, index):
        _, weights = self.inner.step(p, labeled, index)
        return [norm(row ** (1 / self.temperature)) for row in p], weights


class Open:
    """Otsu's split of the running histogram of the entropies: each threshold is tried, by the two groups themselves."""

    def __init__(self, inner, momentum, bins=64):
        self.inner, self.histogram, self.bins = inner, Mean(momentum, np.full(bins, 1 / bins)), bins

    def step(self, p, labeled, index):
        scores = [-sum(v * np.log(v) for v in row if v > 0) / np.log(len(row)) for row in p]
        places = [min(int(score * self.bins), self.bins - 1) for score in scores]
        histogram = self.histogram.move([one_hot(place, self.bins) for place in places])
        best, last = 0.0, 0
        for k in range(self.bins - 1):
            low, high = histogram[: k + 1], histogram[k + 1 :]
            if low.sum() > 1e-12 and high.sum() > 1e-12:
                means = [(part * range(a, b)).sum() / part.sum() for part, a, b in
                         ((low, 0, k + 1), (high, k + 1, self.bins))]  # fmt: skip
                between = low.sum() * high.sum() * (means[0] - means[1]) ** 2
                if between > best * (1 + 1e-12):
                    best, last = between, k
        targets, weights = self.inner.step(p, labeled, index)
        return targets, [w * (place <= last) for w, place in zip(weights, places, strict=True)]

    def regularizer(self, strong, weight):
        return self.inner.regularizer(strong, weight)

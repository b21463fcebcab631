// The library's formulas for the page's two kinds of networks, without anything of the page. Vectors are arrays.
const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
const norm = a => Math.sqrt(dot(a, a));
const plus = (a, b, scale = 1) => a.map((x, k) => x + scale * b[k]);
const times = ([[a, b], [c, d]], [x, y]) => [a * x + b * y, c * x + d * y];

/** Loss, gradient and Hessian at w of the mean of (w₂ tanh(w₁ x) − y)² over examples [x, y]. */
function bend(examples, [w1, w2]) {
  let loss = 0, g1 = 0, g2 = 0, h11 = 0, h12 = 0, h22 = 0;
  for (const [x, y] of examples) {
    const t = Math.tanh(w1 * x), by1 = w2 * x * (1 - t * t), e = w2 * t - y;
    loss += e * e;
    g1 += e * by1;
    g2 += e * t;
    h11 += by1 * by1 - 2 * e * x * t * by1;
    h12 += t * by1 + e * x * (1 - t * t);
    h22 += t * t;
  }
  const n = examples.length, twice = 2 / n;
  return {loss: loss / n, gradient: [twice * g1, twice * g2],
    hessian: [[twice * h11, twice * h12], [twice * h12, twice * h22]]};
}

/** h = f̂ + ν f + (λ/2)‖φ − θ‖² at φ, as `bend`. */
function inner_problem({support, query}, theta, lam, nu, phi) {
  const f = bend(support, phi), away = plus(phi, theta, -1);
  if (nu) {
    const of_query = bend(query, phi);
    f.loss += nu * of_query.loss;
    f.gradient = plus(f.gradient, of_query.gradient, nu);
    f.hessian = f.hessian.map((row, k) => plus(row, of_query.hessian[k], nu));
  }
  const [[a, b], [c, d]] = f.hessian;
  return {loss: f.loss + lam / 2 * dot(away, away), gradient: plus(f.gradient, away, lam), hessian: [[a + lam, b], [c, d + lam]]};
}

/** φ after K steps of gradient descent; `step` is told h's Hessian before each. */
function descend(task, theta, {lam, steps, lr}, nu = 0, step = () => {}) {
  let phi = theta;
  for (let k = 0; k < steps; k++) {
    const {gradient, hessian} = inner_problem(task, theta, lam, nu, phi);
    step(hessian);
    phi = plus(phi, gradient, -lr);
  }
  return phi;
}

/** x with Ax = b, to ‖b − Ax‖ ≤ tol‖b‖ or as far as A is seen to be positive definite. */
function conjugate_gradients(matrix, b, steps, tol) {
  let x = b.map(() => 0), r = b, p = b, rr = dot(b, b);
  const enough = tol * tol * rr;
  for (let k = 0; k < steps && rr > enough; k++) {
    const ap = times(matrix, p), curvature = dot(p, ap);
    if (curvature <= 0) break;
    x = plus(x, p, rr / curvature);
    r = plus(r, ap, -rr / curvature);
    const before = rr;
    rr = dot(r, r);
    p = plus(r, p, rr / before);
  }
  return x;
}

/** The minimiser of h that Newton's method with a line search finds from θ. */
function solve(task, theta, lam, tol = 1e-10) {
  let phi = theta, at = inner_problem(task, theta, lam, 0, phi);
  for (let k = 0; k < 100 && norm(at.gradient) > tol; k++) {
    const down = at.gradient.map(x => -x), found = conjugate_gradients(at.hessian, down, 250, Math.min(0.5, Math.sqrt(norm(down))));
    const step = found.some(x => x) ? found : down, slope = dot(at.gradient, step);
    let length = 1;
    for (let halved = 0; halved < 40; halved++, length /= 2) {
      const enough = at.loss + 1e-4 * length * slope + 2e-14 * (1 + Math.abs(at.loss));
      if (inner_problem(task, theta, lam, 0, plus(phi, step, length)).loss <= enough) break;
    }
    phi = plus(phi, step, length);
    at = inner_problem(task, theta, lam, 0, phi);
  }
  return phi;
}

/** A task's meta-gradient at θ by each method. */
const ESTIMATORS = {
  maml(task, theta, at) {
    let columns = [[1, 0], [0, 1]];  // of ∂φ/∂θ; h's Hessian has λI, and the gradient's derivative by θ is −λI
    const phi = descend(task, theta, at, 0, hessian => {
      columns = columns.map((v, j) => plus(v, times(hessian, v), -at.lr).map((x, i) => i === j ? x + at.lr * at.lam : x));
    });
    return times(columns, bend(task.query, phi).gradient);
  },
  fomaml: (task, theta, at) => bend(task.query, descend(task, theta, at)).gradient,
  reptile: (task, theta, at) => plus(theta, descend(task, theta, at), -1),
  imaml: (task, theta, at) => implicit(task, theta, at.lam, descend(task, theta, at), 5),
  forward: (task, theta, at) => plus(descend(task, theta, at, at.nu), descend(task, theta, at), -1)
    .map(x => -at.lam * x / at.nu),
  symmetric: (task, theta, at) => plus(descend(task, theta, at, at.nu), descend(task, theta, at, -at.nu), -1)
    .map(x => -at.lam * x / (2 * at.nu)),
  exact: (task, theta, at) => implicit(task, theta, at.lam, solve(task, theta, at.lam), 5000),
};

/** λ (∇²f̂ + λI)⁻¹ ∇f at φ. */
function implicit(task, theta, lam, phi, steps) {
  const found = conjugate_gradients(inner_problem(task, theta, lam, 0, phi).hessian, bend(task.query, phi).gradient, steps, 1e-10);
  return found.map(x => lam * x);
}

/** The mean over tasks. `at`: {lam, steps, lr, nu}. */
const meta_gradient = (name, tasks, theta, at) => tasks.map(task => ESTIMATORS[name](task, theta, at))
  .reduce((sum, g) => plus(sum, g)).map(x => x / tasks.length);

const silu = z => z / (1 + Math.exp(-z));

/** A network of layers of such sizes with SiLU between them: its value at x, and what the backward pass needs. */
function network(parameters, sizes, x) {
  const layers = [];
  let start = 0, input = Float64Array.of(x);
  for (let l = 0; l + 1 < sizes.length; l++) {
    const [wide, high] = [sizes[l], sizes[l + 1]], sums = new Float64Array(high), bias = start + wide * high;
    for (let i = 0, at = start; i < high; i++) {
      let sum = parameters[bias + i];
      for (let j = 0; j < wide; j++) sum += parameters[at++] * input[j];
      sums[i] = sum;
    }
    layers.push({start, bias, input, sums});
    input = l + 2 < sizes.length ? sums.map(silu) : sums;
    start = bias + high;
  }
  return {value: input[0], layers};
}

/** The mean of (network − y)² over points [x, y]. */
const mean_squared = (parameters, sizes, points) =>
  points.reduce((sum, [x, y]) => sum + (network(parameters, sizes, x).value - y) ** 2, 0) / points.length;

/** The parameters after one step of gradient descent on that. */
function descent_step(parameters, sizes, points, lr) {
  const moved = Float64Array.from(parameters);
  for (const [x, y] of points) {
    const {value, layers} = network(parameters, sizes, x);
    let by_sums = [2 * (value - y) / points.length];
    for (let l = layers.length - 1; l >= 0; l--) {
      const {start, bias, input} = layers[l], wide = input.length, by_input = new Float64Array(wide);
      by_sums.forEach((g, i) => {
        moved[bias + i] -= lr * g;
        for (let j = 0; j < wide; j++) {
          by_input[j] += g * parameters[start + i * wide + j];
          moved[start + i * wide + j] -= lr * g * input[j];
        }
      });
      by_sums = l ? layers[l - 1].sums.map((z, j) => {
        const s = 1 / (1 + Math.exp(-z));
        return by_input[j] * s * (1 + z * (1 - s));
      }) : [];
    }
  }
  return moved;
}

"""The C++ of placing atoms and of its adjoint, one pass over the z-matrix each; all kernels' prelude goes before."""

SOURCE = """
// A conformation's numbers lie at array[k * array_step]: a step of 1 in a tile of vector registers, on a GPU the
// tensor's. q and its slopes are [bonds | angles | torsions]. The z-matrix is the seed a, b, c, then rows of
// [atom, bond, angle, torsion], references first. b stands at zero; of a frame, the 9 numbers of a rotation, e1 and e2
// are read.
#define AT(array, k) array[(k) * array##_step]
#define LOAD(array, i) Vector{AT(array, 3 * (i)), AT(array, 3 * (i) + 1), AT(array, 3 * (i) + 2)}
#define STORE(array, i, v) \\
  { const Vector stored = v; AT(array, 3 * (i)) = stored.x; AT(array, 3 * (i) + 1) = stored.y; \\
    AT(array, 3 * (i) + 2) = stored.z; }

struct Vector { V x, y, z; };
DEVICE Vector operator+(const Vector& a, const Vector& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
DEVICE Vector operator-(const Vector& a, const Vector& b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
DEVICE Vector operator*(const V& s, const Vector& a) { return {s * a.x, s * a.y, s * a.z}; }
DEVICE V dot(const Vector& a, const Vector& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
DEVICE Vector cross(const Vector& a, const Vector& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

// The axes that three references span: along bond -> angle, towards the torsion atom, out of their plane.
struct Axes {
  Vector arm, e1, e2, e3;
  V per_length, per_height;  // 1 / |angle - bond|; 1 / the distance of the torsion atom from that axis
  Mask defined;              // not collinear; where they are, all numbers are finite and mean nothing
};
DEVICE Axes span(const Vector& bond, const Vector& angle, const Vector& torsion) {
  const T limit = sizeof(T) == 4 ? T(16) / T(1 << 23) : T(16) / T(1LL << 52);
  const V one(T(1));
  Axes a;
  const Vector axis = angle - bond;
  a.arm = torsion - angle;
  const Vector normal = cross(axis, a.arm);
  const V axis2 = dot(axis, axis), normal2 = dot(normal, normal);
  a.defined = f_gt(normal2, V(limit * limit) * axis2 * dot(a.arm, a.arm));
  a.per_length = f_rsqrt(f_where(a.defined, axis2, one));
  const V per_normal = f_rsqrt(f_where(a.defined, normal2, one));
  a.per_height = axis2 * a.per_length * per_normal;
  a.e1 = a.per_length * axis;
  a.e3 = per_normal * normal;
  a.e2 = cross(a.e3, a.e1);
  return a;
}

// The positions x; 1, or 0 where references are collinear.
DEVICE V place(const V* q, const long q_step, const V* frame, const long frame_step, const bool framed, V* x,
               const long x_step, const int* zmatrix, const long atoms) {
  const V zero(T(0)), one(T(1));
  Vector e1{one, zero, zero}, e2{zero, one, zero};
  if (framed) {
    e1 = Vector{AT(frame, 0), AT(frame, 3), AT(frame, 6)};
    e2 = Vector{AT(frame, 1), AT(frame, 4), AT(frame, 7)};
  }
  const long angles = atoms - 1, torsions = 2 * atoms - 3;
  const V second = AT(q, 1), opening = AT(q, angles);
  STORE(x, zmatrix[0], AT(q, 0) * e1)
  STORE(x, zmatrix[1], (Vector{zero, zero, zero}))
  STORE(x, zmatrix[2], (second * f_cos(opening)) * e1 + (second * f_sin(opening)) * e2)
  V defined = one;
  for (long t = 0; t < atoms - 3; ++t) {
    const int* row = zmatrix + 3 + 4 * t;
    const Vector bond = LOAD(x, row[1]);
    const Axes a = span(bond, LOAD(x, row[2]), LOAD(x, row[3]));
    const V r = AT(q, 2 + t), theta = AT(q, angles + 1 + t), phi = AT(q, torsions + t), across = r * f_sin(theta);
    STORE(x, row[0], bond + (r * f_cos(theta)) * a.e1 + (across * f_cos(phi)) * a.e2 - (across * f_sin(phi)) * a.e3)
    defined = f_where(a.defined, defined, zero);
  }
  return defined;
}

// From the last atom to the first, what pulls at an atom becomes the slopes of its three coordinates and pulls at its
// references. Where those move, the axes turn by some small w, and the atom by w x (x - bond): what the references feel
// is the torque (x - bond) x pull. g enters as the gradient by the positions and is used up.
DEVICE void pull_back(const V* q, const long q_step, const V* frame, const long frame_step, const bool framed,
                      const V* x, const long x_step, V* g, const long g_step, V* slope, const long slope_step, V* turn,
                      const long turn_step, const int* zmatrix, const long atoms) {
  const V zero(T(0)), one(T(1));
  const long angles = atoms - 1, torsions = 2 * atoms - 3;
  for (long t = atoms - 4; t >= 0; --t) {
    const int* row = zmatrix + 3 + 4 * t;
    const Axes a = span(LOAD(x, row[1]), LOAD(x, row[2]), LOAD(x, row[3]));
    const V r = AT(q, 2 + t), theta = AT(q, angles + 1 + t), phi = AT(q, torsions + t);
    const V cosine = f_cos(theta), sine = f_sin(theta), c = f_cos(phi), s = f_sin(phi);
    const Vector pull = LOAD(g, row[0]);
    const V g1 = dot(pull, a.e1), g2 = dot(pull, a.e2), g3 = dot(pull, a.e3);
    const V across = c * g2 - s * g3, about = sine * (c * g3 + s * g2);
    AT(slope, 2 + t) = cosine * g1 + sine * across;
    AT(slope, angles + 1 + t) = r * (cosine * across - sine * g1);
    AT(slope, torsions + t) = -(r * about);
    // The torque along e1, e2, e3. The axis turns about e2 and e3; about e1, arm and axis turn the plane they span.
    const V t1 = r * about, t2 = -(r * (sine * s * g1 + cosine * g3)), t3 = r * (cosine * g2 - sine * c * g1);
    const V by_arm = t1 * a.per_height;
    const Vector on_arm = by_arm * a.e3;
    const Vector on_axis = a.per_length * (t3 * a.e2 - (t2 + by_arm * dot(a.arm, a.e1)) * a.e3);
    STORE(g, row[1], LOAD(g, row[1]) + pull - on_axis)
    STORE(g, row[2], LOAD(g, row[2]) + on_axis - on_arm)
    STORE(g, row[3], LOAD(g, row[3]) + on_arm)
  }
  Vector e1{one, zero, zero}, e2{zero, one, zero};
  if (framed) {
    e1 = Vector{AT(frame, 0), AT(frame, 3), AT(frame, 6)};
    e2 = Vector{AT(frame, 1), AT(frame, 4), AT(frame, 7)};
  }
  const V second = AT(q, 1), cosine = f_cos(AT(q, angles)), sine = f_sin(AT(q, angles));
  const Vector on_a = LOAD(g, zmatrix[0]), on_c = LOAD(g, zmatrix[2]);
  const V g1 = dot(on_c, e1), g2 = dot(on_c, e2);
  AT(slope, 0) = dot(on_a, e1);
  AT(slope, 1) = cosine * g1 + sine * g2;
  AT(slope, angles) = second * (cosine * g2 - sine * g1);
  if (!framed) return;
  const Vector on_e1 = AT(q, 0) * on_a + (second * cosine) * on_c, on_e2 = (second * sine) * on_c;
  STORE(turn, 0, (Vector{on_e1.x, on_e2.x, zero}))
  STORE(turn, 1, (Vector{on_e1.y, on_e2.y, zero}))
  STORE(turn, 2, (Vector{on_e1.z, on_e2.z, zero}))
}

// ---- batches: every array with the distances of its rows and of the numbers in a row --------------------------------

#define IN(array) const T *array, int array##_row, int array##_step
#define OUT(array) T *array, int array##_row, int array##_step

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define ROW(array, i) array + (i) * (long)array##_row, array##_step

extern "C" __global__ void place_batch(IN(q), IN(frame), int framed, OUT(x), bool* defined, const int* zmatrix,
                                       int atoms, int rows) {
  const long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < rows) defined[i] = place(ROW(q, i), ROW(frame, i), framed, ROW(x, i), zmatrix, atoms) > 0;
}
extern "C" __global__ void pull_back_batch(IN(q), IN(frame), int framed, IN(x), OUT(g), OUT(slope), OUT(turn),
                                           const int* zmatrix, int atoms, int rows) {
  const long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i < rows)
    pull_back(ROW(q, i), ROW(frame, i), framed, ROW(x, i), ROW(g, i), ROW(slope, i), ROW(turn, i), zmatrix, atoms);
}
#else
static void read(IN(array), const long first, const long filled, const long size, V* tile) {
  T* numbers = reinterpret_cast<T*>(tile);
  for (long lane = 0; lane < WIDTH; ++lane) {
    const T* row = array + (first + (lane < filled ? lane : 0)) * array_row;
    for (long k = 0; k < size; ++k) numbers[k * WIDTH + lane] = row[k * (long)array_step];
  }
}
static void write(const V* tile, OUT(array), const long first, const long filled, const long size) {
  const T* numbers = reinterpret_cast<const T*>(tile);
  for (long lane = 0; lane < filled; ++lane) {
    T* row = array + (first + lane) * array_row;
    for (long k = 0; k < size; ++k) row[k * (long)array_step] = numbers[k * WIDTH + lane];
  }
}
#define ARRAY(array) array, array##_row, array##_step

template <typename Body>
static int for_tiles(const long rows, const long scratch, const int threads, const Body& body) {
  int failed = 0;
  #pragma omp parallel num_threads(threads) if (threads > 1)
  {
    V* M = static_cast<V*>(std::aligned_alloc(64, (scratch * sizeof(V) + 63) / 64 * 64));
    if (M == nullptr) {
      #pragma omp atomic write
      failed = 1;
    }
    #pragma omp for schedule(static)
    for (long first = 0; first < rows; first += WIDTH)
      if (M != nullptr) body(M, first, std::min<long>(WIDTH, rows - first));
    std::free(M);
  }
  return failed;
}

extern "C" int place_batch(IN(q), IN(frame), int framed, OUT(x), bool* defined, const int* zmatrix, int atoms, int rows,
                           int threads) {
  const long xyz = 3 * atoms, size = xyz - 6;
  return for_tiles(rows, size + 9 + xyz, threads, [=](V* M, const long first, const long filled) {
    V *Q = M, *F = Q + size, *X = F + 9;
    read(ARRAY(q), first, filled, size, Q);
    if (framed) read(ARRAY(frame), first, filled, 9, F);
    T flags[WIDTH];
    spread(place(Q, 1, F, 1, framed, X, 1, zmatrix, atoms), flags);
    for (long lane = 0; lane < filled; ++lane) defined[first + lane] = flags[lane] > 0;
    write(X, ARRAY(x), first, filled, xyz);
  });
}
extern "C" int pull_back_batch(IN(q), IN(frame), int framed, IN(x), IN(g), OUT(slope), OUT(turn), const int* zmatrix,
                               int atoms, int rows, int threads) {
  const long xyz = 3 * atoms, size = xyz - 6;
  return for_tiles(rows, 2 * (size + 9 + xyz), threads, [=](V* M, const long first, const long filled) {
    V *Q = M, *F = Q + size, *X = F + 9, *G = X + xyz, *S = G + xyz, *R = S + size;
    read(ARRAY(q), first, filled, size, Q);
    if (framed) read(ARRAY(frame), first, filled, 9, F);
    read(ARRAY(x), first, filled, xyz, X);
    read(ARRAY(g), first, filled, xyz, G);
    pull_back(Q, 1, F, 1, framed, X, 1, G, 1, S, 1, R, 1, zmatrix, atoms);
    write(S, ARRAY(slope), first, filled, size);
    if (framed) write(R, ARRAY(turn), first, filled, 9);
  });
}
#endif
"""

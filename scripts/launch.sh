#!/usr/bin/env bash
# The recipes of Consistency Models (arXiv 2303.01469) and of other denoising objectives, each a short command on a
# preset of configs/.
#
#   scripts/launch.sh                    list the recipes
#   scripts/launch.sh NAME [FLAGS...]    run one; FLAGS win over the recipe's
#   scripts/launch.sh NAME --dry_run     print the resolved run and do nothing; so does DRY_RUN=1
#
# Settings, as environment variables:
#   RANKS=8                    ranks to start
#   LAUNCHER="mpiexec -n 8"    what starts them, where RANKS is not enough; on SLURM "srun --mpi=pmi2"
#   PYTHON=.venv/bin/python    the interpreter; mpiexec is taken from beside it if it is there
#   DATA=data                  holds the images, in the folders of datasets/README.md
#   MODELS=models              holds the checkpoints, by their published names; where one is missing, the recipe that
#                              trains it is looked for in RUNS
#   REFS=refs                  holds the reference batches of the evaluator, by their published names
#   RUNS=runs                  a recipe's results are in RUNS/NAME; one that was interrupted goes on from there
set -euo pipefail
shopt -s extglob
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Name, what it does, preset, flags. Two steps are not published for the distilled cats and for CIFAR-10: search them.
recipes() {
    cat <<'TABLE'
# ImageNet-64
edm_imagenet64                | train the EDM teacher   | imagenet64/edm.yaml
heun_edm_imagenet64           | sample it in 40 steps   | imagenet64/sample_edm.yaml
ito_edm_imagenet64            | by the reverse SDE, 80  | imagenet64/sample_ito.yaml
cd_imagenet64_l2              | distil it with l2       | imagenet64/cd.yaml        | --loss_norm l2
onestep_cd_imagenet64_l2      | sample it in one step   | imagenet64/sample_cd.yaml | --sampler onestep
multistep_cd_imagenet64_l2    | sample it in two steps  | imagenet64/sample_cd.yaml | --sampler multistep --ts 0,22,39
cd_imagenet64_lpips           | distil it with LPIPS    | imagenet64/cd.yaml
onestep_cd_imagenet64_lpips   | sample it in one step   | imagenet64/sample_cd.yaml | --sampler onestep
multistep_cd_imagenet64_lpips | sample it in two steps  | imagenet64/sample_cd.yaml | --sampler multistep --ts 0,22,39
search_cd_imagenet64_lpips    | find its best two steps | imagenet64/sample_cd.yaml
ct_imagenet64                 | train without a teacher | imagenet64/ct.yaml
onestep_ct_imagenet64         | sample it in one step   | imagenet64/sample_ct.yaml | --sampler onestep
multistep_ct_imagenet64       | sample it in two steps  | imagenet64/sample_ct.yaml | --sampler multistep --ts 0,106,200
search_ct_imagenet64          | find its best two steps | imagenet64/sample_ct.yaml
# LSUN Bedroom-256
edm_bedroom256                | train the EDM teacher   | lsun256/edm.yaml
heun_edm_bedroom256           | sample it in 40 steps   | lsun256/sample_edm.yaml
cd_bedroom256_l2              | distil it with l2       | lsun256/cd.yaml           | --loss_norm l2
onestep_cd_bedroom256_l2      | sample it in one step   | lsun256/sample_cd.yaml    | --sampler onestep
multistep_cd_bedroom256_l2    | sample it in two steps  | lsun256/sample_cd.yaml    | --sampler multistep --ts 0,18,39
cd_bedroom256_lpips           | distil it with LPIPS    | lsun256/cd.yaml
onestep_cd_bedroom256_lpips   | sample it in one step   | lsun256/sample_cd.yaml    | --sampler onestep
multistep_cd_bedroom256_lpips | sample it in two steps  | lsun256/sample_cd.yaml    | --sampler multistep --ts 0,17,39
search_cd_bedroom256_lpips    | find its best two steps | lsun256/sample_cd.yaml
ct_bedroom256                 | train without a teacher | lsun256/ct.yaml
onestep_ct_bedroom256         | sample it in one step   | lsun256/sample_ct.yaml    | --sampler onestep
multistep_ct_bedroom256       | sample it in two steps  | lsun256/sample_ct.yaml    | --sampler multistep --ts 0,67,150
search_ct_bedroom256          | find its best two steps | lsun256/sample_ct.yaml
# LSUN Cat-256
edm_cat256                    | train the EDM teacher   | lsun256/edm.yaml
heun_edm_cat256               | sample it in 40 steps   | lsun256/sample_edm.yaml
cd_cat256_l2                  | distil it with l2       | lsun256/cd.yaml           | --loss_norm l2
onestep_cd_cat256_l2          | sample it in one step   | lsun256/sample_cd.yaml    | --sampler onestep
search_cd_cat256_l2           | find its best two steps | lsun256/sample_cd.yaml
cd_cat256_lpips               | distil it with LPIPS    | lsun256/cd.yaml
onestep_cd_cat256_lpips       | sample it in one step   | lsun256/sample_cd.yaml    | --sampler onestep
search_cd_cat256_lpips        | find its best two steps | lsun256/sample_cd.yaml
ct_cat256                     | train without a teacher | lsun256/ct.yaml
onestep_ct_cat256             | sample it in one step   | lsun256/sample_ct.yaml    | --sampler onestep
multistep_ct_cat256           | sample it in two steps  | lsun256/sample_ct.yaml    | --sampler multistep --ts 0,62,150
search_ct_cat256              | find its best two steps | lsun256/sample_ct.yaml
# CIFAR-10
edm_cifar10                   | train the EDM teacher   | cifar10/edm.yaml
heun_edm_cifar10              | sample it in 18 steps   | cifar10/sample_edm.yaml
ito_edm_cifar10               | by the reverse SDE, 40  | cifar10/sample_ito.yaml
cdm_cifar10                   | CDM on DDPM++           | cifar10/cdm.yaml
heun_cdm_cifar10              | sample it in 18 steps   | cifar10/sample_denoiser.yaml
stf_cifar10                   | STF on NCSN++           | cifar10/stf.yaml
heun_stf_cifar10              | sample it in 18 steps   | cifar10/sample_denoiser.yaml
sadpm_cifar10                 | SA-DPM on DDPM's U-Net  | cifar10/sadpm.yaml
ddim_sadpm_cifar10            | sample it in 100 steps  | cifar10/sample_ddim.yaml
cd_cifar10                    | distil it with LPIPS    | cifar10/cd.yaml
onestep_cd_cifar10            | sample it in one step   | cifar10/sample_cd.yaml    | --sampler onestep
search_cd_cifar10             | find its best two steps | cifar10/sample_cd.yaml
ct_cifar10                    | train without a teacher | cifar10/ct.yaml
onestep_ct_cifar10            | sample it in one step   | cifar10/sample_ct.yaml    | --sampler onestep
search_ct_cifar10             | find its best two steps | cifar10/sample_ct.yaml
# FFHQ-64, AFHQv2-64 and CelebA-64
cdm_ffhq64                    | CDM on DDPM++           | cdm/ffhq64.yaml
heun_cdm_ffhq64               | sample it in 40 steps   | cdm/sample.yaml
cdm_afhqv2                    | CDM on DDPM++           | cdm/afhqv2_64.yaml
heun_cdm_afhqv2               | sample it in 40 steps   | cdm/sample.yaml
sadpm_celeba64                | SA-DPM on DDIM's U-Net  | sadpm/celeba64.yaml
ddim_sadpm_celeba64           | sample it in 100 steps  | sadpm/sample.yaml
sadpm_ffhq64                  | SA-DPM on DDIM's U-Net  | sadpm/ffhq64.yaml
ddim_sadpm_ffhq64             | sample it in 100 steps  | sadpm/sample.yaml
sadpm_afhqv2                  | SA-DPM on DDIM's U-Net  | sadpm/afhqv2_64.yaml
ddim_sadpm_afhqv2             | sample it in 100 steps  | sadpm/sample.yaml
TABLE
}

name=${1:-}
if [[ -z $name || $name == -h || $name == --help ]]; then
    echo "scripts/launch.sh NAME [FLAGS...] with one of these names:"
    recipes | awk -F ' *[|] *' '/^#/ { print "\n" substr($0, 3); next } { printf "  %-30s %s\n", $1, $2 }'
    exit 0
fi
shift
recipe=$(recipes | awk -F ' *[|] *' -v name="$name" '$1 == name { print $3, $4 }')
if [[ -z $recipe ]]; then
    echo "launch.sh: no recipe is called '$name'; choose one of:" $(recipes | sed '/^#/d; s/ .*//') >&2
    exit 2
fi
read -ra flags <<<"$recipe"
preset=$root/configs/${flags[0]}

# Where the files are: by the names that they are published under.
model=${name#@(heun|ito|ddim|onestep|multistep|search)_}
case $model in
    *_imagenet64*) images=imagenet family=imagenet64 reference=VIRTUAL_imagenet64_labeled ;;
    *_bedroom256*) images=lsun_bedroom family=bedroom256 reference=VIRTUAL_lsun_bedroom256 ;;
    *_cat256*) images=lsun_cat family=cat256 reference=VIRTUAL_lsun_cat256 ;;
    *_ffhq64*) images=ffhq64 family=ffhq64 reference=ffhq-64x64 ;;
    *_afhqv2*) images=afhqv2 family=afhqv2 reference=afhqv2-64x64 ;;
    *_celeba64*) images=celeba64 family=celeba64 reference=celeba-64x64 ;;
    *_cifar10*) images=cifar10 family=cifar10 reference=cifar10-32x32 ;;
esac
data_dir=${DATA:-data}/$images
weights_of() {                                              # NAME FILE: the file, or the folder of the run NAME
    local file=${MODELS:-models}/$2 run=${RUNS:-runs}/$1
    [[ -e $file || ! -d $run ]] && echo "$file" || echo "$run"
}
teacher=$(weights_of "edm_$family" "edm_${family}_ema.pt")
trained=$(weights_of "$model" "$model.pt")
[[ $model != edm_* ]] || trained=$teacher
case $name in
    edm_* | cdm_* | stf_* | sadpm_*) script=edm_train.py files=(--data_dir "$data_dir") ;;
    cd_*) script=cm_train.py files=(--data_dir "$data_dir" --teacher_model_path "$teacher") ;;
    ct_*) script=cm_train.py files=(--data_dir "$data_dir") ;;
    search_*) script=ternary_search.py files=(--model_path "$trained" --ref_batch "${REFS:-refs}/$reference.npz") ;;
    *) script=image_sample.py files=(--model_path "$trained") ;;
esac

python=${PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python ]] && ! python=$(command -v "${PYTHON:-python3}"); then
    echo "launch.sh: there is no ${PYTHON:-python3}; run \`make install\`, or set PYTHON" >&2
    exit 2
fi
mpiexec=$(dirname "$python")/mpiexec
[[ -x $mpiexec ]] || mpiexec=mpiexec
launcher=("$mpiexec" -n "${RANKS:-8}")
[[ -z ${LAUNCHER:-} ]] || read -ra launcher <<<"$LAUNCHER"
if ! command -v "${launcher[0]}" >/dev/null; then
    echo "launch.sh: there is no ${launcher[0]}; run \`make install\`, or set LAUNCHER (LAUNCHER=env: one rank, without MPI)" >&2
    exit 2
fi
[[ ${DRY_RUN:-0} == 0 ]] || set -- --dry_run "$@"

set -x
exec "${launcher[@]}" "$python" "$root/scripts/$script" --config "$preset" --log_dir "${RUNS:-runs}/$name" \
    "${files[@]}" "${flags[@]:1}" "$@"

# shellcheck shell=bash disable=SC2154
# -- what every job does: the same lines in all scripts --------------------------------------------------------------
#
# One step trains. It ends with a code that says what is next (README, "exit codes"): 0 finished, 75 saved since it was
# asked to, 2 and 4 would only come again, all else is a failure that a new attempt may not meet. Some time before the
# time limit Slurm signals this shell alone (--signal=B:USR1); the step is asked by the file RUN/stop, since a signal to
# it would reach every process of it. A new attempt goes on from the last checkpoint.

die() {
    printf 'launch: %s\n' "$*" >&2
    exit 1
}

say() { printf 'launch: %s: %s\n' "$(date '+%F %T')" "$*" >&2; }

last_step() { # of the newest checkpoint; 0 where there is none
    local folder step newest=0
    for folder in "$run"/checkpoints/step-*; do
        step=${folder##*-}
        if [[ -d $folder && $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then newest=$((10#$step)); fi
    done
    echo "$newest"
}

note() { # EVENT STEP FIELDS: a line of attempts.jsonl
    printf '{"event": "%s", "submission": "%s", "job": "%s", "attempt": %d, "time": %d, "step": %d, %s}\n' \
        "$1" "$submission" "$job" "$attempt" "$(date +%s)" "$2" "$3" >>"$record"
}

lines() { # PATTERN: this submission's lines that hold it
    { grep -F "\"submission\": \"$submission\"" -- "$record" || true; } | { grep -E -- "$1" || true; }
}

begin() {
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        member "$SLURM_ARRAY_TASK_ID"
    else
        job=$SLURM_JOB_ID
    fi
    record=$run/launch/attempts.jsonl
    mkdir -p -- "$run/launch" "$run/logs"
    touch -- "$record"
    over=$(lines '"next": "none"' | tail -n 1)
    if [[ $over ]]; then # a job of a chain whose work is done
        over=${over#*'"why": "'}
        say "nothing is left to do: ${over%%'"'*}"
        exit 0
    fi
    attempt=$(($(lines '"event": "begin"' | wc -l) + 1))
    first_step=$(last_step)
    note begin "$first_step" "\"nodes\": \"$SLURM_JOB_NODELIST\""
    failed=$((attempt - 1 - $(lines '"why": "(time limit|ended by Slurm)", "good": true' | wc -l)))
    if ((failed >= max_attempts)); then # an attempt that a dead node ended comes here without an end
        end 1 "$failed attempts failed" none
        exit 1
    fi
    say "attempt $attempt of job $job on $SLURM_JOB_NODELIST, from step $first_step on"
}

end() { # CODE WHY NEXT
    local step new good=false
    step=$(last_step)
    new=$((step - first_step))
    if ((new > 0)); then good=true; fi
    note end "$step" "\"new\": $new, \"code\": $1, \"why\": \"$2\", \"good\": $good, \"next\": \"$3\""
    say "attempt $attempt ended: $2 (exit code $1), step $step is saved; next: $3"
}

meet() { # where the ranks meet
    local nodes address
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # A node's name need not resolve to where the others reach it; its address in Slurm does.
    address=$(scontrol show node "${nodes%%$'\n'*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    : "${MASTER_ADDR:=$address}"
    : "${MASTER_PORT:=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 12000))}"
    export MASTER_ADDR MASTER_PORT
}

compose() { # the step, from the settings: srun's options and the words of the command
    # By name: in the container these have the values that they have here.
    local passed=(OMP_NUM_THREADS "${names[@]}" "${!NCCL_@}" "${!GLOO_@}")
    srun_options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks_per_node")
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    step_command=("${command[@]}")
    if ((direct)); then
        passed+=(MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE)
    else
        step_command+=(--nodes "$SLURM_JOB_NUM_NODES" --master "$MASTER_ADDR:$MASTER_PORT")
    fi
    case $container in
        docker) in_docker "${passed[@]}" ;;
        pyxis) in_pyxis "${passed[@]}" ;;
    esac
    # What Slurm numbers each task by is known in the task alone; torch.distributed reads other names.
    # shellcheck disable=SC2016
    if ((direct)); then
        step_command=(bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            export LOCAL_WORLD_SIZE=$0; exec "$@"' "$tasks_per_node" "${step_command[@]}")
    else
        step_command=(bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' bash "${step_command[@]}")
    fi
}

in_docker() { # NAMES of variables
    local words name folder
    words=(docker run "${docker_options[@]}" --label "pretrain.job=$SLURM_JOB_ID" --workdir "$work")
    words+=(--user "$(id -u):$(id -g)" --env HOME=/tmp --env "USER=$(id -un)")
    for name in "$@"; do words+=(--env "$name"); done
    for folder in "${mounts[@]}"; do words+=(--mount "type=bind,source=$folder,target=$folder"); done
    if ((gpus)); then
        if [[ -e /dev/infiniband ]]; then words+=(--device=/dev/infiniband); fi
        # shellcheck disable=SC2016
        words=(bash -c 'exec "${@:1:2}" --gpus "\"device=${SLURM_STEP_GPUS:-$SLURM_JOB_GPUS}\"" "${@:3}"' bash "${words[@]}")
    fi
    step_command=("${words[@]}" "$image" "${step_command[@]}")
}

in_pyxis() { # NAMES of variables: the image's own values would win over those that are not named
    local folder mounted='' named
    for folder in "${mounts[@]}"; do mounted+=${mounted:+,}$folder:$folder; done
    named=$(
        IFS=,
        echo "$*"
    )
    srun_options+=(--container-image="$image" --container-mounts="$mounted" --container-workdir="$work"
        --no-container-mount-home --container-env="$named")
}

remove_containers() { # that a killed docker client left behind; a job that is over gets no step, and its ranks were asked to end
    if [[ $container != docker ]] || ! still_running; then return; fi
    # shellcheck disable=SC2016
    timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c \
        'docker ps -aq --filter "label=pretrain.job=$0" | xargs -r docker rm -f' "$SLURM_JOB_ID" >/dev/null || true
}

ask_to_stop() { # until the step has ended: one that only begins takes an older file away
    while :; do
        touch -- "$run/stop"
        sleep 2
    done
}

train() { # run the step; its exit code in $code, whether Slurm asked to leave in $leaving
    local step asker='' interrupted
    leaving=''
    trap 'interrupted=yes leaving=yes' USR1
    trap 'interrupted=yes' TERM # the step gets its own, and saves
    rm -f -- "$run/stop"
    srun --kill-on-bad-exit=1 --wait=60 --label "${srun_options[@]}" "${step_command[@]}" &
    step=$!
    while :; do
        interrupted=''
        code=0
        wait "$step" || code=$?
        [[ $interrupted ]] || break # else the trap ended the wait
        if [[ $leaving && ! $asker ]]; then
            say "$stop_before s to the time limit: asked the run to save and end"
            ask_to_stop >/dev/null 2>&1 &
            asker=$!
        fi
    done
    trap '' USR1
    if [[ $asker ]]; then
        kill "$asker" 2>/dev/null || true # Slurm may have ended it with all the rest
        wait "$asker" 2>/dev/null || true
    fi
    rm -f -- "$run/stop"
    remove_containers
}

still_running() { # not one that was cancelled, preempted or is out of time
    [[ $(scontrol show job -o "$SLURM_JOB_ID") == *JobState=RUNNING* ]]
}

decide() { # what is next after $code
    local again=requeue stuck
    ((chained)) && again=chain
    stuck=$(lines '"event": "end"' | tail -n 1)
    case $code in
        0) end 0 finished none ;;
        2) end 2 "a mistake" none ;;
        4) end 4 diverged none ;;
        *)
            if ! still_running; then
                end "$code" "ended by Slurm" slurm
            elif ((code == 75)) && [[ ! $leaving ]]; then
                end 75 "asked to stop" none
            elif ((code == 75 && $(last_step) > first_step)); then
                end 75 "time limit" "$again"
            elif ((failed + 1 >= max_attempts)); then
                end "$code" "failed, as $failed attempts before" none
            elif (($(last_step) == first_step)) && [[ $stuck == *'"good": false'* ]]; then
                end "$code" "failed, and two attempts in a row saved no step" none
            else
                end "$code" "failed" "$again"
            fi
            ;;
    esac
}

leave() { # as decided
    local next
    next=$(lines '"event": "end"' | tail -n 1)
    next=${next##*\"next\": \"}
    [[ $next == requeue* ]] || exit "$code"
    still_running || exit "$code" # a job that is being cancelled must not come to life again
    scontrol requeue "$SLURM_JOB_ID" || die "this cluster lets no job be requeued: submit with --chain N"
    sleep 60 # until Slurm ends this shell
}

cd -- "$work" || die "$work: the folder that it was submitted from is not here"
begin
meet
compose
train
decide
leave

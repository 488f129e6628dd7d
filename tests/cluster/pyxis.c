/* Stands for NVIDIA's pyxis, which takes the same options of srun: --container-image (here a folder that holds a root file
 * system), --container-mounts (A:B,C:D), --container-workdir, --container-env and --no-container-mount-home. The task runs
 * in that folder by chroot, with the mounts in a namespace of its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1)

enum { IMAGE, MOUNTS, WORKDIR, ENV, NO_HOME, OPTIONS };
static char given[OPTIONS][4096];

static int take(int number, const char *value, int remote) {
    snprintf(given[number], sizeof given[number], "%s", value ? value : "yes");
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "PATH", "folder of a root file system", 1, IMAGE, take},
    {"container-mounts", "A:B", "folders, and where they are seen", 1, MOUNTS, take},
    {"container-workdir", "PATH", "where the task begins", 1, WORKDIR, take},
    {"container-env", "NAMES", "variables that win over the image's", 1, ENV, take},
    {"no-container-mount-home", NULL, "leave the home folder out", 0, NO_HOME, take},
};

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    for (int i = 0; i < OPTIONS; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS) return -1;
    return 0;
}

static int fail(const char *what, const char *path) {
    slurm_error("pyxis: %s %s: %s", what, path, strerror(errno));
    return -1;
}

static int mount_in(const char *from, const char *to) {
    char path[8192];
    snprintf(path, sizeof path, "%s%s", given[IMAGE], to);
    for (char *end = strchr(path + 1, '/'); end; end = strchr(end + 1, '/')) {
        *end = 0;
        mkdir(path, 0755);
        *end = '/';
    }
    mkdir(path, 0755);
    return mount(from, path, NULL, MS_BIND | MS_REC, NULL) ? fail("cannot mount", path) : 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments) {
    if (!given[IMAGE][0]) return 0;
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) return fail("no namespace for", "/");
    if (mount_in("/proc", "/proc") || mount_in("/dev", "/dev")) return -1;
    for (char *rest = given[MOUNTS], *one; (one = strsep(&rest, ",")) && *one;) {
        char *to = strchr(one, ':');
        if (!to) return fail("no place for", one);
        *to++ = 0;
        if (mount_in(one, to)) return -1;
    }
    if (chroot(given[IMAGE]) || chdir(given[WORKDIR])) return fail("cannot enter", given[WORKDIR]);
    return 0;
}

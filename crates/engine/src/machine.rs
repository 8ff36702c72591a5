//! What the machine is and has to give: free memory, counting the limits of a container or job.
//!
//! Linux reads `/proc/meminfo` and the memory limits of every control group the process is in, both
//! versions; other systems are asked through the `sysinfo` library. Never guesses: an unknown value
//! is `None` and the caller says so.

/// Memory that this process could still take without swapping, in bytes.
///
/// The smaller of the system's available memory and what is left in the process's control groups.
pub fn available_memory() -> Option<u64> {
    imp::available_memory()
}

/// Memory of the whole system, in bytes.
pub fn total_memory() -> Option<u64> {
    imp::total_memory()
}

/// The processor's name for people.
pub fn cpu_name() -> Option<String> {
    imp::cpu_name()
}

/// The operating system's kernel and its version, for people.
pub fn kernel() -> Option<String> {
    imp::kernel()
}

#[cfg(target_os = "linux")]
mod imp {
    use std::fs::read_to_string;
    use std::path::{Path, PathBuf};

    pub fn total_memory() -> Option<u64> {
        super::meminfo(&read_to_string("/proc/meminfo").ok()?, "MemTotal:")
    }

    pub fn cpu_name() -> Option<String> {
        super::field(&read_to_string("/proc/cpuinfo").ok()?, "model name")
    }

    pub fn kernel() -> Option<String> {
        let release = read_to_string("/proc/sys/kernel/osrelease").ok()?;
        Some(format!("Linux {}", release.trim()))
    }

    pub fn available_memory() -> Option<u64> {
        let meminfo = read_to_string("/proc/meminfo").ok()?;
        let system = super::meminfo(&meminfo, "MemAvailable:")?;
        let groups = read_to_string("/proc/self/cgroup").unwrap_or_else(|_| String::new());
        let left = super::memory_groups(&groups)
            .into_iter()
            .filter_map(|(v2, path)| if v2 { left_in_v2(&path) } else { left_in_v1(&path) });
        Some(left.fold(system, u64::min))
    }

    fn left_in_v2(path: &str) -> Option<u64> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let root =
            Path::new(roots.iter().find(|r| Path::new(r).join("cgroup.controllers").exists())?);
        smallest_left(root, path, ("memory.max", "memory.current"), "inactive_file ")
    }

    fn left_in_v1(path: &str) -> Option<u64> {
        let files = ("memory.limit_in_bytes", "memory.usage_in_bytes");
        smallest_left(Path::new("/sys/fs/cgroup/memory"), path, files, "total_inactive_file ")
    }

    /// Walks from the process's group to the root: every ancestor's limit holds.
    fn smallest_left(
        root: &Path,
        path: &str,
        (limit_file, usage_file): (&str, &str),
        reclaimable: &str,
    ) -> Option<u64> {
        let mut dir: PathBuf = root.join(path.trim_start_matches('/'));
        // Inside a container the path of the host may not exist: the mounted root is our group.
        if !dir.exists() {
            dir = root.to_path_buf();
        }
        let mut least = None;
        loop {
            if let Some(limit) = number(&dir.join(limit_file)) {
                let used = number(&dir.join(usage_file)).unwrap_or(0);
                let cached =
                    read_to_string(dir.join("memory.stat")).unwrap_or_else(|_| String::new());
                let left =
                    limit.saturating_sub(used.saturating_sub(super::stat(&cached, reclaimable)));
                least = Some(least.map_or(left, |l: u64| l.min(left)));
            }
            if dir == root || !dir.pop() {
                return least;
            }
        }
    }

    fn number(path: &Path) -> Option<u64> {
        read_to_string(path).ok()?.trim().parse().ok()
    }
}

#[cfg(not(target_os = "linux"))]
mod imp {
    pub fn total_memory() -> Option<u64> {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        Some(system.total_memory()).filter(|&bytes| bytes > 0)
    }

    pub fn cpu_name() -> Option<String> {
        let mut system = sysinfo::System::new();
        system.refresh_cpu_all();
        let name = system.cpus().first()?.brand().trim().to_string();
        Some(name).filter(|name| !name.is_empty())
    }

    pub fn kernel() -> Option<String> {
        Some(format!("{} {}", sysinfo::System::name()?, sysinfo::System::kernel_version()?))
    }

    pub fn available_memory() -> Option<u64> {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        Some(system.available_memory()).filter(|&bytes| bytes > 0)
    }
}

/// The value of the first `name : value` line of `/proc/cpuinfo`.
#[cfg(any(target_os = "linux", test))]
fn field(text: &str, name: &str) -> Option<String> {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    let mut named = fields.filter(|(key, _)| key.trim() == name);
    named.next().map(|(_, value)| value.trim().to_string())
}

/// An entry of `/proc/meminfo`, named with its colon, in bytes.
#[cfg(any(target_os = "linux", test))]
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.starts_with(name))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// The memory groups in `/proc/self/cgroup`: whether version 2, and the path.
#[cfg(any(target_os = "linux", test))]
fn memory_groups(text: &str) -> Vec<(bool, String)> {
    let mut groups = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers.is_empty() || controllers.split(',').any(|c| c == "memory") {
            groups.push((controllers.is_empty(), path.to_string()));
        }
    }
    groups
}

/// One counter of a group's `memory.stat`; 0 if it is not there.
#[cfg(any(target_os = "linux", test))]
fn stat(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_system_are_read_as_written() {
        let text = "MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable:   64 kB\n";
        assert_eq!(meminfo(text, "MemAvailable:"), Some(65_536));
        assert_eq!(meminfo(text, "MemTotal:"), Some(102_400));
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU: 2 GHz\nmodel name\t: B\n";
        assert_eq!(field(cpuinfo, "model name"), Some("A CPU: 2 GHz".to_string()));
        let groups = "9:memory:/job/7\n2:cpu,cpuacct:/x\n0::/user.slice\n";
        assert_eq!(
            memory_groups(groups),
            [(false, "/job/7".to_string()), (true, "/user.slice".to_string())]
        );
        assert_eq!(stat("cache 1\ntotal_inactive_file 4096\n", "total_inactive_file "), 4096);
    }

    #[test]
    fn this_machine_has_some_memory() {
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}

{{/* The Jobs: trainer, demo, SFT, reward model. */}}

{{/*
ConfigMap and Job of a component. A Job's pod template cannot be changed, so a hash of it ends the
name: an upgrade that changes it makes another Job and deletes the old one, whose process writes a
checkpoint and ends. Takes root, component, key, args, config, configFile, ports, readiness.
*/}}
{{- define "kleash.job" -}}
{{- $values := index .root.Values .key -}}
{{- $pod := include "kleash.podTemplate" (merge (dict "restartPolicy" "Never" "grace" $values.terminationGracePeriodSeconds) .) -}}
{{- $name := include "kleash.name" . -}}
{{- $job := ternary (printf "%s-%s" $name (sha256sum $pod | trunc 8)) $name .root.Values.hashJobNames -}}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "kleash.metadata" . | nindent 2 }}
data:
  {{ .configFile }}: |
    {{- .config | nindent 4 }}
---
apiVersion: batch/v1
kind: Job
metadata:
  {{- include "kleash.metadata" (merge (dict "name" $job "labels" (include "kleash.kueueLabels" $values | fromJson)) .) | nindent 2 }}
spec:
  {{- /* Kueue lets it go; an upgrade that said so again would stop it, and Kueue itself suspends what an upgrade makes. */}}
  {{- if and $values.kueue.queueName .root.Release.IsInstall }}
  suspend: true
  {{- end }}
  completions: 1
  parallelism: 1
  backoffLimit: {{ $values.backoffLimit }}
  {{- with $values.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ . }}
  {{- end }}
  {{- if not (kindIs "invalid" $values.ttlSecondsAfterFinished) }}
  ttlSecondsAfterFinished: {{ $values.ttlSecondsAfterFinished }}
  {{- end }}
  # One pod at a time: the next one starts when the last one has ended.
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      # Status 2: the user's input cannot be used, and trying again would not change that.
      - action: FailJob
        onExitCodes:
          operator: In
          values: [2]
      # Evicted, preempted, drained: no fault of the pod.
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
      # Status 143: told to stop, and stopped in order.
      - action: Ignore
        onExitCodes:
          operator: In
          values: [143]
  template:
    {{- $pod | nindent 4 }}
{{- end -}}

{{- define "kleash.kueueLabels" -}}
{{- $labels := dict -}}
{{- with .kueue.queueName }}{{ $_ := set $labels "kueue.x-k8s.io/queue-name" . }}{{ end -}}
{{- with .kueue.priorityClass }}{{ $_ := set $labels "kueue.x-k8s.io/priority-class" . }}{{ end -}}
{{- toJson $labels -}}
{{- end -}}
